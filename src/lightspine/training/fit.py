"""One training run from start to end: the same function serves the command line and a call from Python."""

import importlib.util
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightspine.data.modules import ImageDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.training.base import LightspineTask
from lightspine.training.callbacks import (
    FinalValidation,
    GradientAccumulation,
    RunLog,
    RunProgressBar,
    plot_curves,
)
from lightspine.training.checkpoint import BEST, LAST, AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from lightspine.training.finetuning import describe_start
from lightspine.training.log_filters import filter_lightning_logs, has_terminal
from lightspine.training.rank_watchdog import RankWatchdog
from lightspine.training.resume import (
    EpochState,
    TrainingInterruptedError,
    find_checkpoint,
    prepare_folder,
    report_last_checkpoint,
)

__all__ = ["Export", "TrainResult", "TrainingInterruptedError", "run_callbacks", "run_training", "train"]

_log = logging.getLogger(__name__)

# A quiet, plain run; every one of them can be set on the command line.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "logger": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


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


def train(
    task: LightspineTask,
    data: ImageDataModule,
    *,
    folder: str | Path,
    epochs: int = 10,
    resume: str | Path | None = None,
    export: Export = "last",
    save_every_steps: int | None = None,
    effective_batch: int | None = None,
    grad_checkpointing: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
    gradient_clip: float | None = None,
    accelerator: str = "auto",
    precision: Any = "32-true",
    progress: bool = True,
    **trainer_options: Any,
) -> TrainResult:
    """Train a task on data and save everything into a folder.

    Args:
        task: what is trained.
        data: what it is trained on; its number of classes must be the task's.
        folder: is made; a folder with an earlier run gets a numbered neighbour unless `resume` is given.
        epochs: passes over the training images, those before `resume` included.
        resume: a `last.ckpt` of an earlier run to go on from, in the same folder; "auto" is the one in
            `folder`, and begins where there is none.
        export: save the weights of the last epoch, or of the one that scored best on the held-out images.
        save_every_steps: write `last.ckpt` after so many steps too, and not only after every epoch.
        effective_batch: images per step over all devices, reached by gradient accumulation.
        grad_checkpointing: recompute activations in the backward pass: slower, with less memory.
        compile: run the model through `torch.compile`.
        tensorboard: write the numbers for TensorBoard too, into `folder/tensorboard`.
        gradient_clip: largest norm of the gradient.
        accelerator: Lightning's name of the device kind: "cpu", "gpu", "mps" or "auto".
        precision: Lightning's name of the number format, such as "bf16-mixed".
        progress: show a live bar in a terminal, or a line per epoch on the standard error elsewhere.
        **trainer_options: anything else that Lightning's Trainer takes.

    Returns:
        The paths and scores of the run.

    Raises:
        UsageError: the class counts differ, `resume` is no file, or an option does not fit the others.
        LightspineError: the loss diverged, no image can be read, a checkpoint is damaged or cannot be
            written, or another process of a distributed run died.
        TrainingInterruptedError: Ctrl-C.
    """
    folder = prepare_folder(folder, resume=resume)
    callbacks = run_callbacks(
        folder,
        score=task.score,
        progress=progress,
        live=has_terminal(),
        save_every_steps=save_every_steps,
        effective_batch=effective_batch,
    )
    callbacks += trainer_options.pop("callbacks", [])
    with filter_lightning_logs():
        trainer = pl.Trainer(
            **TRAINER_DEFAULTS
            | {
                "max_epochs": epochs,
                "default_root_dir": folder,
                "gradient_clip_val": gradient_clip,
                "accelerator": accelerator,
                "devices": 1,
                "precision": precision,
                "enable_progress_bar": progress and has_terminal(),
            }
            | trainer_options,
            callbacks=callbacks,
        )
    return run_training(
        trainer,
        task,
        data,
        resume=resume,
        export=export,
        grad_checkpointing=grad_checkpointing,
        compile=compile,
        tensorboard=tensorboard,
    )


def run_training(
    trainer: pl.Trainer,
    task: LightspineTask,
    data: ImageDataModule,
    *,
    resume: str | Path | None = None,
    export: Export = "last",
    grad_checkpointing: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
) -> TrainResult:
    """Train with a trainer that has the callbacks of `run_callbacks`; see `train`."""
    if data.num_classes != task.num_classes:
        raise UsageError(f"expected a task with {data.num_classes} classes, got {task.num_classes}")
    for limit in ("max_epochs", "max_steps"):
        if getattr(trainer, limit) == 0:
            raise UsageError(f"expected a {limit} of at least 1, got 0")
    # torch's synchronised batch norms have no version for a CPU.
    if getattr(trainer.strategy, "_layer_sync", None) and trainer.strategy.root_device.type == "cpu":
        raise UsageError("expected a GPU for sync_batchnorm, got the cpu")
    log = _callback(trainer, RunLog)
    checkpoint = find_checkpoint(log.folder, resume, trainer.max_epochs)
    if grad_checkpointing:
        set_grad_checkpointing(task.backbone)
    if compile:
        task.model.compile()
    if tensorboard:
        trainer.logger = _tensorboard(log.folder)
    # FSDP has an atomic way of its own and refuses any other.
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO and "fsdp" not in _name(trainer.strategy):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    if hasattr(task.model, "load_report") and trainer.is_global_zero:
        _log.info("%s", describe_start(task.model))
    started = time.perf_counter()
    with filter_lightning_logs(), report_last_checkpoint(log.folder / LAST):
        _fit(trainer, task, data, checkpoint)
    seconds = time.perf_counter() - started

    return finish(log, task, data, export=export, seconds=seconds, write=trainer.is_global_zero)


def run_callbacks(
    folder: Path,
    *,
    score: str,
    progress: bool,
    live: bool,
    save_every_steps: int | None = None,
    effective_batch: int | None = None,
) -> list[pl.Callback]:
    """Return the callbacks that every run has: checkpoints, the log and, if asked for, the progress bar."""
    callbacks: list[pl.Callback] = [RankWatchdog()]
    if effective_batch is not None:
        callbacks.append(GradientAccumulation(effective_batch))
    callbacks += [
        RunLog(folder, announce=progress and not live),
        EpochState(),
        FinalValidation(),
        # Two of them: Lightning's save_last leaves out the epochs that are not the best. The last one comes
        # last: its file holds the state of the other.
        BestCheckpoint(folder, score),
        LastCheckpoint(folder, every_n_steps=save_every_steps),
    ]
    if progress and live:
        callbacks.append(RunProgressBar())
    return callbacks


def set_grad_checkpointing(model: nn.Module) -> None:
    """Let a model recompute its activations in the backward pass, which takes time and saves memory.

    Raises:
        UsageError: the model cannot.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise UsageError(f"expected a model with gradient checkpointing, got {type(model).__name__}")
    try:
        switch(True)
    # timm's way to say that a model cannot.
    except AssertionError as error:
        raise UsageError(
            f"expected a model with gradient checkpointing, got {type(model).__name__}"
        ) from error


def _fit(trainer: pl.Trainer, task: LightspineTask, data: ImageDataModule, checkpoint: Path | None) -> None:
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except LightspineError:
        raise
    # What a collective operation says when another process is gone depends on the backend.
    except Exception as error:
        lost = _callback(trainer, RankWatchdog).explain(timeout_s=5.0)
        if lost is None:
            raise
        raise LightspineError(f"{lost}, so the run was stopped") from error


def _tensorboard(folder: Path) -> TensorBoardLogger:
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise UsageError("expected the package tensorboard for --tensorboard: pip install tensorboard")
    return TensorBoardLogger(folder, name="", version="tensorboard")


def _callback(trainer: Any, kind: type) -> Any:
    # An attribute that Lightning's type annotations do not know.
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def _name(strategy: object) -> str:
    return type(strategy).__name__.lower()


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
        files[task.export_weights] = weights
    for kind, file in files.items():
        if kind != task.export_weights:
            _export(task, data, stored[entries[kind]], file if write else None, about)
    # Last, so that the task keeps them.
    _export(
        task,
        data,
        stored[entries.get(task.export_weights, "state_dict")],
        weights if write else None,
        with_score,
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
        skipped=dict(task.bad_images.reasons),
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
