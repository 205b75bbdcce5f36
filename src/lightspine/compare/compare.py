"""Train several models on the same images, then measure accuracy and latency of all of them."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightspine.benchmark import count_macs, describe_system, measure_latency_ms
from lightspine.benchmark.scatter import ScatterPoint, plot_accuracy_over_latency
from lightspine.compare.contact_sheet import draw_contact_sheet
from lightspine.compare.results import CompareResult, ModelResult
from lightspine.compare.runs import CompareData, ModelRun
from lightspine.errors import LightspineError
from lightspine.evaluation import evaluate, predict
from lightspine.models import find_record
from lightspine.models.factory import load_model
from lightspine.training.fit import TrainingInterruptedError, TrainResult
from lightspine.training.resume import prepare_folder
from lightspine.utils.files import atomic_write
from lightspine.utils.image_files import open_image

_SHEET_IMAGES = 10
_PLOT_DPI = 150

_log = logging.getLogger(__name__)


def compare(
    runs: Sequence[ModelRun],
    folder: str | Path,
    *,
    data: CompareData,
    settings: dict[str, Any] | None = None,
    latency_repeats: int = 50,
    progress: bool = True,
) -> CompareResult:
    """Train each model, then measure all of them; a model that fails does not stop the others.

    After each model, `results.json` and `NAME.safetensors` are written to the folder (training curves and
    metrics to the subfolder `NAME`), at the end `accuracy_latency.png` and `predictions.png`. Ctrl-C stops
    the training; the finished models are still measured and saved.

    Args:
        runs: the training runs.
        folder: output folder, which is created; if it is not empty, `folder-2`, ... is used.
        data: the held-out images for all models.
        settings: training settings to store in the results file.
        latency_repeats: timed forward passes of each model.
        progress: show progress bars.

    Returns:
        The results of all models, including those that failed.
    """
    started = time.perf_counter()
    folder = prepare_folder(folder)
    result = CompareResult(
        folder=folder,
        data=data.name,
        system=describe_system(),
        settings=settings or {},
        models=[ModelResult(name=run.name) for run in runs],
    )
    for number, (run, row) in enumerate(zip(runs, result.models, strict=True), start=1):
        _log.info("[%d/%d] %s", number, len(runs), run.name)
        _train_one(run, row, data, folder, progress)
        _log.info("[%d/%d] %s", number, len(runs), _describe_outcome(row))
        result.seconds = time.perf_counter() - started
        result.save()
        if row.status == "interrupted":
            break
    if result.finished:
        _measure_latency(result, latency_repeats)
        _draw_figures(result, data)
    result.seconds = time.perf_counter() - started
    result.save()
    return result


def _train_one(run: ModelRun, row: ModelResult, data: CompareData, folder: Path, progress: bool) -> None:
    try:
        _record_training(run.train(folder / run.name, progress), row, data, folder)
        row.status = "done"
    except (TrainingInterruptedError, KeyboardInterrupt) as error:
        row.status, row.error = "interrupted", str(error) or "interrupted"
    except LightspineError as error:
        row.status, row.error = "failed", str(error)
    except Exception as error:
        # A timm model that does not support these images must not stop the others.
        row.status, row.error = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        _log.debug("%s failed", run.name, exc_info=True)


def _record_training(trained: TrainResult, row: ModelResult, data: CompareData, folder: Path) -> None:
    checkpoint = folder / f"{row.name}.safetensors"
    trained.weights.replace(checkpoint)
    # Delete the large training checkpoints: a finished run is not resumed.
    for path in {trained.last_checkpoint, trained.best_checkpoint}:
        path.unlink(missing_ok=True)
    model, saved = load_model(checkpoint)
    row.input_size = tuple(saved.preprocessing["input_size"])
    row.params = sum(parameter.numel() for parameter in model.parameters())
    row.macs = count_macs(model, row.input_size).total
    # Evaluate the saved file and not the model in memory.
    report = evaluate(checkpoint, data.source, val_fraction=data.val_fraction, seed=data.seed)
    row.accuracy = report["top1"]
    row.train_seconds = trained.seconds
    row.checkpoint = checkpoint.name
    row.skipped = trained.skipped | report["skipped"]


def _describe_outcome(row: ModelResult) -> str:
    if row.accuracy is None or row.train_seconds is None:
        return f"{row.name} {row.status}: {row.error}"
    return f"{row.name}: {row.accuracy:.2f} % after {row.train_seconds:.0f} s"


def _measure_latency(result: CompareResult, repeats: int) -> None:
    models, inputs = {}, {}
    for row in result.finished:
        models[row.name], saved = load_model(result.folder / str(row.checkpoint))
        inputs[row.name] = torch.randn(1, *saved.preprocessing["input_size"])
    _log.info("measuring the latency of all models")
    for name, latency in measure_latency_ms(models, inputs, repeats=repeats).items():
        row = next(row for row in result.finished if row.name == name)
        row.latency_ms, row.latency_p90_ms = latency.median_ms, latency.p90_ms


def _draw_figures(result: CompareResult, data: CompareData) -> None:
    system, rows = result.system, result.finished
    points = [
        ScatterPoint(
            label=f"{row.name}  {row.params / 1e6:.1f}M",
            latency_ms=row.latency_ms,
            accuracy=row.accuracy,
            family=record.family if (record := find_record(row.name)) else None,
            params=row.params,
        )
        for row in rows
        if row.latency_ms is not None and row.accuracy is not None and row.params is not None
    ]
    figure, _ = plot_accuracy_over_latency(
        points,
        title=f"Accuracy over latency: {data.name}",
        note=f"{result.conditions}, torch {system['versions']['torch']}; "
        "marker area grows with the number of parameters",
        x_label="latency of one image in ms (median)",
        y_label="accuracy on held-out images in %",
    )
    with atomic_write(result.folder / "accuracy_latency.png") as file:
        figure.savefig(file, format="png", dpi=_PLOT_DPI)
    images = data.held_out_images(result.folder / "images", count=_SHEET_IMAGES)
    predictions = {
        row.name: [
            prediction.classes[0]
            for prediction in predict(result.folder / str(row.checkpoint), [i.path for i in images], topk=1)
        ]
        for row in rows
    }
    draw_contact_sheet(
        [open_image(image.path) for image in images],
        [image.label for image in images],
        predictions,
        result.folder / "predictions.png",
        title=f"Held-out images of {data.name} and predictions of each model",
    )
    result.files += ["accuracy_latency.png", "predictions.png"]
