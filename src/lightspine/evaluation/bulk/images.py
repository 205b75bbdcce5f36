"""Predictions and features of any number of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightspine.errors import UsageError
from lightspine.evaluation.bulk.folder import RunFolder
from lightspine.evaluation.bulk.formats import Csv, Npy, Parquet, find_format
from lightspine.evaluation.bulk.options import InferenceOptions
from lightspine.evaluation.bulk.outputs import Features, TopClasses
from lightspine.evaluation.bulk.run import run_job

PREDICTION_FORMATS: dict[str, type] = {"csv": Csv, "parquet": Parquet}
FEATURE_FORMATS: dict[str, type] = {"npy": Npy, "parquet": Parquet}


def predict_images(
    model: str | Path,
    data: str | Path,
    folder: str | Path,
    *,
    topk: int = 5,
    format: str = "csv",
    options: InferenceOptions | None = None,
) -> dict[str, Any]:
    """Tell the likeliest classes of any number of images, each exactly once.

    Writes into the folder `predictions.csv` (or `.parquet`): path, class_1, name_1, probability_1, class_2,
    ...; `bad_images.csv`: path and reason of the images that could not be used; `run.json`: what was done.
    Rows are in the order of the listing, paths relative to `data` (of shards: SHARD/MEMBER).

    Args:
        model: a checkpoint file, or the name of a model together with `options.checkpoint`.
        data: a folder with images at any depth, or shards: a `.tar` file, a pattern such as
            `train-{000..012}.tar`, a folder of them.
        folder: where the files go; a new one, unless the run is resumed.
        topk: how many classes to tell; at most all.
        format: "csv" or "parquet" (needs pyarrow).
        options: how it is done.

    Returns:
        The content of `run.json`: `settings`, `images`, `bad`, and of the call that ended the run `computed`
        (images), `seconds`, `images_per_second`, `checkpoint`, `batch_size`, `device`, `devices`,
        `threads`, `versions`.

    Raises:
        UsageError: a wrong model, folder or value, or a run to resume that has other settings.
        LightspineError: the checkpoint cannot be read, a file cannot be written, a process died.
    """
    output_folder = RunFolder(folder, "predictions", find_format(format, PREDICTION_FORMATS))
    return run_job(model, data, output_folder, TopClasses(topk), options or InferenceOptions())


def embed_images(
    model: str | Path,
    data: str | Path,
    folder: str | Path,
    *,
    stages: Sequence[str | int] = ("pooled",),
    maps: bool = False,
    format: str = "npy",
    options: InferenceOptions | None = None,
) -> dict[str, Any]:
    """Compute the features of any number of images, each exactly once.

    Writes into the folder `features/COLUMN-PART.npy`, float32, (images of the part, channels), and
    `index.csv`: path, part, row; or one `features.parquet` with a list of fixed length per column. Else as
    `predict_images`.

    Args:
        model: a checkpoint file, or the name of a model together with `options.checkpoint`.
        data: see `predict_images`.
        folder: see `predict_images`.
        stages: "pooled" (the vector that the classifier takes), numbers of stages from 0 (their map, averaged
            over the image), or "all".
        maps: keep the stages' maps, (images of the part, channels, height, width); only as "npy".
        format: "npy" or "parquet" (needs pyarrow).
        options: how it is done.

    Returns:
        As `predict_images`.

    Raises:
        UsageError: as `predict_images`, and for an unknown stage.
        LightspineError: as `predict_images`.
    """
    if maps and format != "npy":
        raise UsageError(f"expected the format npy for maps, got {format}")
    name = "index" if format == "npy" else "features"
    output_folder = RunFolder(folder, name, find_format(format, FEATURE_FORMATS))
    output = Features(tuple(map(str, stages)), maps)
    return run_job(model, data, output_folder, output, options or InferenceOptions())
