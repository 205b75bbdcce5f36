"""What a run leaves behind: the exported weights, the curves and the summary that a caller gets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lightspine.data.modules import ImageDataModule
from lightspine.training.base import LightspineTask
from lightspine.training.checkpoints import BEST, LAST
from lightspine.training.run_log import RunLog, plot_curves

Export = Literal["last", "best"]

# Where Lightning puts the trained weights when the averaged ones take the usual place.
_TRAINED = "current_model_state"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        model: name of the model.
        folder: everything below lies here, with `metrics.csv` and `curves.png`.
        weights: the exported model, for `evaluate`, `predict` and `lightspine.create_model`; with averaging
            the one that the task publishes, averaged or raw.
        raw_weights: with averaging, the trained weights; else None.
        ema_weights: with averaging, the averaged weights; else None.
        last_checkpoint: full state of training after the last epoch, to resume from.
        best_checkpoint: the same after the epoch with the best score.
        score_name: what the score is: "val_top1", "val_box_AP", "val_mask_AP" or "val_mIoU".
        score: in percent, of the exported weights on the held-out images.
        best_score: the highest of any epoch. Chosen on the images it is measured on, so it flatters.
        seconds: duration of this call of the training, validation included.
        history: one dictionary per epoch: epoch, seconds, train_loss, val_loss, val_top1, lr, ...
        skipped: path -> reason of the images that could not be used.
    """

    model: str
    folder: Path
    weights: Path
    raw_weights: Path | None
    ema_weights: Path | None
    last_checkpoint: Path
    best_checkpoint: Path
    score_name: str
    score: float
    best_score: float
    seconds: float
    history: list[dict[str, float]] = field(repr=False)
    skipped: dict[str, str] = field(repr=False)


def finish(
    log: RunLog,
    task: LightspineTask,
    data: ImageDataModule,
    *,
    export: Export,
    seconds: float,
    write: bool,
) -> TrainResult:
    """Export a run's weights from its checkpoint, draw its curves and sum it up.

    Args:
        log: with the rows of all epochs.
        task: receives the exported weights.
        data: what it was trained on.
        export: the epoch whose weights are exported.
        seconds: duration of the training.
        write: write the files; one process of a distributed run does.
    """
    # An epoch may have no validation; the last one has.
    best = max((row for row in log.rows if task.score in row), key=lambda row: row[task.score])
    chosen = best if export == "best" else log.rows[-1]
    # The file and not the memory: a run that was resumed behind its last epoch has trained nothing.
    path = log.folder / (BEST if export == "best" else LAST)
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    about = {"epochs": str(len(log.rows)), "seed": str(task.seed)}
    with_score = about | {task.score: f"{chosen[task.score]:.2f}"}
    weights = log.folder / "model.safetensors"
    # kind -> entry of the checkpoint; with averaging `state_dict` holds the averaged weights.
    entries = {"raw": _TRAINED, "ema": "state_dict"} if _TRAINED in stored else {}
    files = {kind: log.folder / f"model_{kind}.safetensors" for kind in entries}
    if entries:
        files[task.publish] = weights
    for kind, file in files.items():
        if kind != task.publish:
            _export(task, data, stored[entries[kind]], file if write else None, about)
    # Last, so that the task keeps them.
    _export(
        task, data, stored[entries.get(task.publish, "state_dict")], weights if write else None, with_score
    )
    if write:
        plot_curves(log.folder / "curves.png", log.rows, task.model_name, task.curves)
    return TrainResult(
        model=task.model_name,
        folder=log.folder,
        weights=weights,
        raw_weights=files.get("raw"),
        ema_weights=files.get("ema"),
        last_checkpoint=log.folder / LAST,
        best_checkpoint=log.folder / BEST,
        score_name=task.score,
        score=chosen[task.score],
        best_score=best[task.score],
        seconds=seconds,
        history=log.rows,
        skipped=dict(task.skipped),
    )


def _export(
    task: LightspineTask,
    data: ImageDataModule,
    state: dict[str, Any],
    file: Path | None,
    metadata: dict[str, str],
) -> None:
    task.load_state_dict(state)
    if file is not None:
        task.save(file, data, metadata)
