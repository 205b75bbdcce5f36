"""Batch inference: predict classes or compute features, sharded across ranks and resumable."""

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightspine.data.dataset import Batch
from lightspine.data.transforms import Preprocessing, create_eval_transform
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.batch_inference.outputs import (
    Compute,
    Features,
    Table,
    TopClasses,
    finite_rows,
)
from lightspine.evaluation.batch_inference.ranks import Rank, join_ranks, launch_ranks, read_rank
from lightspine.evaluation.batch_inference.sources import create_loader, hash_listing, open_images
from lightspine.evaluation.batch_inference.storage import Csv, Npy, Parquet, RunFolder
from lightspine.evaluation.classifiers import Weights, find_preprocessing, load_classifier
from lightspine.evaluation.common import describe_environment, hash_file
from lightspine.utils.devices import check_device
from lightspine.utils.folder_lock import lock_folder
from lightspine.utils.progress import progress_bar
from lightspine.utils.rank_monitor import RANK_TIMEOUT_S
from lightspine.utils.resource_errors import resource_errors

_PREDICTION_FORMATS = {"csv": Csv, "parquet": Parquet}
_FEATURE_FORMATS = {"npy": Npy, "parquet": Parquet}
_NOT_FINITE = "the model gives values that are not finite"


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Options of `predict_images` and `embed_images`.

    Attributes:
        checkpoint: weights file, if the model is given by its name.
        weights: "model" (as trained), "ema" (their average), or "auto" for the ones whose score is published.
        image_size: height and width in pixels; default: the checkpoint's.
        crop_pct: see `lightspine.evaluation.classifiers.find_preprocessing`.
        crop_mode: see `lightspine.evaluation.classifiers.find_preprocessing`.
        batch_size: images per forward pass.
        part_size: images per part. A killed run loses at most one part per rank. The rows of one part are
            kept in memory.
        num_workers: data loader processes per rank; 0 loads in the rank itself.
        device: PyTorch device; "cuda" gives each rank its own GPU.
        devices: number of ranks to start on this machine. They are spawned, so a script that sets more than 1
            needs `if __name__ == "__main__"`. Leave it at 1 under torchrun, whose ranks share the work.
        rank_timeout: seconds after which a run of several ranks ends if one does not answer, or computes no
            batch while the others wait for it.
        resume: continue the run in the folder; a finished run is left unchanged.
        progress: show a progress bar on standard error (of rank 0).

    Raises:
        UsageError: a number out of range.
    """

    checkpoint: str | Path | None = None
    weights: Weights = "auto"
    image_size: int | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    batch_size: int = 64
    part_size: int = 1024
    num_workers: int = 0
    device: str = "cpu"
    devices: int = 1
    rank_timeout: float = RANK_TIMEOUT_S
    resume: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        for name, value, minimum in (
            ("batch_size", self.batch_size, 1),
            ("part_size", self.part_size, 1),
            ("num_workers", self.num_workers, 0),
            ("devices", self.devices, 1),
        ):
            if value < minimum:
                raise UsageError(f"expected {name} of at least {minimum}, got {value}")
        if not self.rank_timeout > 0:
            raise UsageError(f"expected a rank timeout above 0 seconds, received {self.rank_timeout:g}")
        if self.devices > 1 and ":" in self.device:
            raise UsageError(f"expected a device type such as cuda for several devices, got {self.device}")


@resource_errors()
def predict_images(
    model: str | Path,
    data: str | Path,
    folder: str | Path,
    *,
    topk: int = 5,
    format: str = "csv",
    options: InferenceOptions | None = None,
) -> dict[str, Any]:
    """Predict the top classes of any number of images, each exactly once.

    Writes `predictions.csv` (or `.parquet`) with the columns path, class_1, name_1, probability_1, class_2,
    ...; `bad_images.csv` with path and reason of images that could not be used; and `run.json`. Rows are in
    the order of the listing, paths are relative to `data` (for shards: SHARD/MEMBER).

    Args:
        model: checkpoint file, or model name together with `options.checkpoint`.
        data: folder with images at any depth, or shards: a `.tar` file, a pattern such as
            `train-{000..012}.tar`, or a folder of them.
        folder: output folder; a new one, unless a run is resumed.
        topk: number of classes per image, limited to those of the model.
        format: "csv" or "parquet" (needs pyarrow).
        options: see `InferenceOptions`.

    Returns:
        The content of `run.json`: `settings`, `images`, `bad`, and for the call that finished the run
        `computed` (images), `seconds`, `images_per_second`, `checkpoint`, `batch_size`, `device`, `devices`,
        `threads`, `versions`.

    Raises:
        UsageError: an invalid model, folder or value, or a run to resume that has other settings.
        LightspineError: the checkpoint cannot be read, a file cannot be written, or a rank failed.
    """
    rows = _find_format(format, _PREDICTION_FORMATS)
    run_folder = RunFolder(folder, "predictions", rows)
    return _run(_Job(model, data, run_folder, TopClasses(topk), options or InferenceOptions()))


@resource_errors()
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
    """Compute features (embeddings) of any number of images, each exactly once.

    Writes `features/COLUMN-PART.npy`, float32, (images of the part, channels), and `index.csv` with path,
    part and row; or one `features.parquet` with a fixed-size list per column. The other files are those of
    `predict_images`.

    Args:
        model: checkpoint file, or model name together with `options.checkpoint`.
        data: see `predict_images`.
        folder: see `predict_images`.
        stages: "pooled" (the vector before the classifier), stage indices from 0 (their feature map averaged
            over height and width), or "all".
        maps: keep the feature maps, (images of the part, channels, height, width); "npy" only.
        format: "npy" or "parquet" (needs pyarrow).
        options: see `InferenceOptions`.

    Returns:
        See `predict_images`.

    Raises:
        UsageError: see `predict_images`; also an unknown stage.
        LightspineError: see `predict_images`.
    """
    if maps and format != "npy":
        raise UsageError(f"expected the format npy for maps, got {format}")
    rows = _find_format(format, _FEATURE_FORMATS)
    run_folder = RunFolder(folder, "index" if format == "npy" else "features", rows)
    output = Features(tuple(map(str, stages)), maps)
    return _run(_Job(model, data, run_folder, output, options or InferenceOptions()))


@dataclass(frozen=True)
class _Job:
    """Arguments of a run, pickled for spawned ranks."""

    model: str | Path
    data: str | Path
    folder: RunFolder
    output: TopClasses | Features
    options: InferenceOptions


def _find_format(name: str, formats: dict[str, Any]) -> Any:
    if name not in formats:
        raise UsageError(f"expected a format of {', '.join(formats)}, got {name!r}")
    return formats[name]()


def _run(job: _Job) -> dict[str, Any]:
    options, rank = job.options, read_rank()
    if options.devices == 1:
        return _run_rank(job)
    if rank.world_size > 1:
        raise UsageError(
            f"expected devices=1 under torchrun, which started {rank.world_size} processes, "
            f"got {options.devices}"
        )
    # Check here, because starting the ranks takes seconds.
    job.folder.check(options.resume)
    for local_rank in range(options.devices):
        check_device(Rank(local_rank, options.devices, local_rank).device(options.device))
    threads = max(1, torch.get_num_threads() // options.devices)
    outcome: dict[str, Any] = launch_ranks(_run_rank, job, threads, ranks=options.devices)
    return outcome


def _run_rank(job: _Job, threads: int | None = None) -> dict[str, Any]:
    """Compute this rank's share of the parts; rank 0 also prepares the folder and joins the parts."""
    options, folder = job.options, job.folder
    if threads is not None:
        torch.set_num_threads(threads)
    with join_ranks(options.rank_timeout) as rank:
        device = rank.device(options.device)
        check_device(device)
        if rank.rank == 0:
            folder.check(options.resume)
        network, metadata = load_classifier(job.model, options.checkpoint, weights=options.weights)
        compute = job.output.prepare(network.to(device), metadata)
        preprocessing = find_preprocessing(
            metadata, image_size=options.image_size, crop_pct=options.crop_pct, crop_mode=options.crop_mode
        )
        with lock_folder(folder.path) if rank.rank == 0 else contextlib.nullcontext():
            if rank.rank == 0:
                # Listing millions of images takes a while.
                rank.wait_is_allowed()
                _prepare_folder(job, metadata.name, preprocessing)
            rank.barrier()
            if folder.outcome is None:
                _run_pending(job, compute, preprocessing, device, rank)
            elif rank.rank == 0:
                folder.remove_parts()
            return folder.outcome or {}


def _prepare_folder(job: _Job, name: str, preprocessing: Preprocessing) -> None:
    """Write the settings and the image listing of a new run, or check those of the run to resume."""
    folder, checkpoint = job.folder, job.options.checkpoint or job.model
    settings = {
        "model": name,
        "checkpoint_sha256": hash_file(checkpoint),
        "weights": job.options.weights,
        "data": os.path.abspath(job.data),
        "preprocessing": preprocessing.to_dict(),
        "output": {"kind": type(job.output).__name__} | asdict(job.output),
        "file": folder.target.name,
        "part_size": job.options.part_size,
    }
    if folder.outcome is not None:
        folder.begin(settings)
        return
    if not folder.settings:
        # Left behind by a run that was killed before it wrote the settings.
        folder.remove_parts()
    images = open_images(job.data, folder.parts)
    folder.begin(settings | {"images": len(images), "listing_sha256": hash_listing(images)})


def _run_pending(job: _Job, compute: Compute, preprocessing: Preprocessing, device: str, rank: Rank) -> None:
    """Compute the unfinished parts together with the other ranks, and finish the run."""
    options, folder = job.options, job.folder
    total = int((folder.settings or {})["images"])
    starts = range(0, total, options.part_size)
    parts = [range(start, min(start + options.part_size, total)) for start in starts]
    pending = folder.pending(len(parts))
    # No rank may finish a part before all ranks have listed the pending ones.
    rank.barrier()
    started = time.perf_counter()
    share = pending[rank.rank :: rank.world_size]
    try:
        _compute_parts(job, {number: parts[number] for number in share}, compute, preprocessing, device, rank)
    except torch.OutOfMemoryError as error:
        raise LightspineError(f"{device} has too little memory for this batch size: {error}") from error
    rank.barrier()
    seconds = time.perf_counter() - started
    if rank.rank == 0:
        rank.wait_is_allowed()
        computed = sum(len(parts[number]) for number in pending)
        folder.finish(
            len(parts),
            {
                "settings": folder.settings,
                "images": total,
                "computed": computed,
                "seconds": round(seconds, 2),
                "images_per_second": round(computed / seconds, 2),
                "checkpoint": str(options.checkpoint or job.model),
                "batch_size": options.batch_size,
                "devices": rank.world_size,
                **describe_environment(device),
            },
        )
    rank.barrier()


def _compute_parts(
    job: _Job,
    parts: dict[int, range],
    compute: Compute,
    preprocessing: Preprocessing,
    device: str,
    rank: Rank,
) -> None:
    """Compute and write parts (number -> positions of their images) in order."""
    if not parts:
        return
    options, folder = job.options, job.folder
    images = open_images(job.data, folder.parts)
    loader = create_loader(
        images,
        create_eval_transform(preprocessing),
        list(parts.values()),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    description = "computing" if rank.world_size == 1 else f"computing (rank 0 of {rank.world_size})"
    batches = iter(progress_bar(loader, description, shown=options.progress and rank.rank == 0))
    for number, part in parts.items():
        positions: list[int] = []
        tables: list[Table] = []
        bad: dict[str, str] = {}
        for batch in itertools.islice(batches, -(-len(part) // options.batch_size)):
            rank.proceed()
            bad |= {image.path: image.reason for image in batch.bad}
            if len(batch.images):
                table, finite = _compute_batch(batch, compute, device)
                tables += [table] if finite.any() else []
                positions += batch.labels[finite].tolist()
                bad |= {images.name(position): _NOT_FINITE for position in batch.labels[~finite].tolist()}
        names = [images.name(position) for position in part]
        folder.write_part(
            number,
            [images.name(position) for position in positions],
            _concatenate(tables),
            [(name, bad[name]) for name in names if name in bad],
        )


def _compute_batch(batch: Batch, compute: Compute, device: str) -> tuple[Table, torch.Tensor]:
    """Return the finite rows of a batch, and the mask of their images; (N,), bool."""
    table = compute(batch.images.to(device, non_blocking=True))
    finite = finite_rows(table)
    return {name: column[finite] for name, column in table.items()}, torch.from_numpy(finite)


def _concatenate(tables: list[Table]) -> Table | None:
    if not tables:
        return None
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
