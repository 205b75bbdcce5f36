"""Training with the Lightning trainer: callbacks, checkpoints and export of the weights."""

import contextlib
import importlib.util
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
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
    plot_curves,
)
from lightspine.training.checkpoint import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    BestCheckpoint,
    LastCheckpoint,
    load_training_state,
)
from lightspine.training.finetuning import describe_start
from lightspine.training.log_filters import filter_lightning_logs, has_terminal
from lightspine.training.progress import LineProgress, RunProgressBar
from lightspine.training.rank_watchdog import RankWatchdog
from lightspine.training.resume import (
    EpochState,
    TrainingInterruptedError,
    find_checkpoint,
    prepare_folder,
    report_last_checkpoint,
)
from lightspine.training.resume_check import check_resumed
from lightspine.utils.folder_lock import lock_folder
from lightspine.utils.rank_monitor import RANK_TIMEOUT_S
from lightspine.utils.resource_errors import resource_errors

__all__ = ["Export", "TrainResult", "TrainingInterruptedError", "run_callbacks", "run_training", "train"]

_log = logging.getLogger(__name__)

# Defaults that differ from Lightning's; flags on the command line override them.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "logger": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


Export = Literal["last", "best"]

# Checkpoint entry of the raw weights if `state_dict` has the EMA weights.
_TRAINED = "current_model_state"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Paths and metrics of a finished run.

    Attributes:
        model: model name.
        folder: folder of the run, which also has `metrics.csv` and `curves.png`.
        weights: the exported model, for `evaluate`, `predict` and `lightspine.create_model`. With EMA, the
            task's `export_weights` selects its weights.
        raw_weights: with EMA, the file of the raw weights, else None.
        ema_weights: with EMA, the file of the EMA weights, else None.
        last_checkpoint: training state after the last epoch, to resume from.
        best_checkpoint: training state after the epoch with the best score.
        score_name: name of the score: "val_top1", "val_box_AP" or "val_mIoU".
        score: score of the exported weights on the validation images, in percent.
        best_score: highest score of all epochs; optimistic, because it is selected on the validation images.
        seconds: duration of this call, including validation.
        history: one dictionary per epoch: epoch, seconds, train_loss, val_loss, val_top1, lr, ...
        skipped: path -> reason of images that could not be used.
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
    export: Export = "best",
    save_every_steps: int | None = None,
    effective_batch: int | None = None,
    rank_timeout: float = RANK_TIMEOUT_S,
    grad_checkpointing: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
    gradient_clip: float | None = None,
    accelerator: str = "auto",
    precision: Any = "32-true",
    progress: bool = True,
    **trainer_options: Any,
) -> TrainResult:
    """Train a task on a data module and save the results to a folder.

    Args:
        task: the task, such as `ClassificationTask`.
        data: the data module, with the same number of classes as the task.
        folder: output folder, which is created. If it has files and `resume` is None, `folder-2`,
            `folder-3`, ... is used.
        epochs: total number of epochs, including those before `resume`.
        resume: path of a `last.ckpt`; the run resumes in its folder. "auto" resumes from the one in
            `folder`, if any.
        export: export the weights of the epoch with the best validation score, or of the last epoch.
        save_every_steps: also write `last.ckpt` every n steps, not only after every epoch.
        effective_batch: total batch size per optimizer step over all devices, by gradient accumulation.
        rank_timeout: seconds after which a distributed run ends if a rank does not answer or proceed.
        grad_checkpointing: recompute activations in the backward pass; slower, saves memory.
        compile: compile the model with `torch.compile`.
        tensorboard: also log to TensorBoard, in `folder/tensorboard`.
        gradient_clip: maximum norm of the gradient.
        accelerator: Lightning's accelerator: "cpu", "gpu", "mps" or "auto".
        precision: Lightning's precision, such as "bf16-mixed".
        progress: print a table with a row per epoch to standard error, and a progress bar in a terminal or
            else a line every 30 seconds.
        **trainer_options: further arguments of Lightning's Trainer.

    Returns:
        The paths and metrics of the run.

    Raises:
        UsageError: the numbers of classes differ, `resume` is not a file or of another model, other classes
            or another split, or options are incompatible.
        LightspineError: training diverged, no image can be read, a checkpoint is damaged or cannot be
            written, another process is writing to the folder, or another rank died.
        TrainingInterruptedError: training was interrupted by Ctrl-C or a signal.
    """
    folder = prepare_folder(folder, resume=resume)
    callbacks = run_callbacks(
        folder,
        score=task.score,
        progress=progress,
        live=has_terminal(),
        save_every_steps=save_every_steps,
        effective_batch=effective_batch,
        rank_timeout=rank_timeout,
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
    export: Export = "best",
    grad_checkpointing: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
) -> TrainResult:
    """Train with a trainer that has the callbacks of `run_callbacks`; see `train` for the arguments."""
    if data.num_classes != task.num_classes:
        raise UsageError(f"expected a task with {data.num_classes} classes, got {task.num_classes}")
    for limit in ("max_epochs", "max_steps"):
        if getattr(trainer, limit) == 0:
            raise UsageError(f"expected a {limit} of at least 1, got 0")
    # PyTorch's SyncBatchNorm has no CPU implementation.
    if getattr(trainer.strategy, "_layer_sync", None) and trainer.strategy.root_device.type == "cpu":
        raise UsageError("expected a GPU for sync_batchnorm, got the cpu")
    task.prepare(data)
    log = _find_callback(trainer, RunLog)
    checkpoint = find_checkpoint(log.folder, resume, trainer.max_epochs)
    if checkpoint is not None:
        check_resumed(checkpoint, task, data)
    if grad_checkpointing:
        set_grad_checkpointing(task.backbone)
    if compile:
        task.model.compile()
    if tensorboard:
        trainer.logger = _tensorboard(log.folder)
    # FSDP accepts only its own CheckpointIO.
    if (
        type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
        and "fsdp" not in type(trainer.strategy).__name__.lower()
    ):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    if hasattr(task.model, "load_report") and trainer.is_global_zero:
        _log.info("%s", describe_start(task.model))
    # Rank 0 writes the files.
    with lock_folder(log.folder) if trainer.is_global_zero else contextlib.nullcontext():
        started = time.perf_counter()
        try:
            with (
                filter_lightning_logs(),
                report_last_checkpoint(log.folder / LAST),
                _find_callback(trainer, RankWatchdog).signals_handled(trainer),
            ):
                _fit(trainer, task, data, checkpoint)
        except TrainingInterruptedError as error:
            # All ranks stop; rank 0 says so.
            error.is_reported = not trainer.is_global_zero
            raise
        seconds = time.perf_counter() - started
        return export_run(log, task, data, export=export, seconds=seconds, write=trainer.is_global_zero)


def run_callbacks(
    folder: Path,
    *,
    score: str,
    progress: bool,
    live: bool,
    save_every_steps: int | None = None,
    effective_batch: int | None = None,
    rank_timeout: float = RANK_TIMEOUT_S,
) -> list[pl.Callback]:
    """Return the callbacks of every run: checkpoints, metrics log and progress bar; see `train`."""
    callbacks: list[pl.Callback] = [RankWatchdog(rank_timeout)]
    if effective_batch is not None:
        callbacks.append(GradientAccumulation(effective_batch))
    callbacks += [
        RunLog(folder, announce=progress),
        EpochState(),
        FinalValidation(),
        # Two callbacks, because Lightning's save_last skips epochs that are not the best. LastCheckpoint
        # comes after BestCheckpoint, because it saves that callback's state.
        BestCheckpoint(folder, score),
        LastCheckpoint(folder, every_n_steps=save_every_steps),
    ]
    if progress:
        callbacks.append(RunProgressBar() if live else LineProgress())
    return callbacks


def export_run(
    log: RunLog,
    task: LightspineTask,
    data: ImageDataModule,
    *,
    export: Export,
    seconds: float,
    write: bool,
) -> TrainResult:
    """Export the weights from the checkpoint of a run, plot its curves and return its result.

    Args:
        log: metrics log with the rows of all epochs.
        task: the task; it receives the exported weights.
        data: the data module.
        export: export the weights of the "last" or the "best" epoch.
        seconds: duration of the training.
        write: whether to write the files; True only on rank 0.
    """
    # Epochs before the last may have no validation.
    best = max((row for row in log.rows if task.score in row), key=lambda row: row[task.score])
    if export == "best" and not (log.folder / BEST).is_file():
        # The run was resumed from a last.ckpt that was copied to another folder.
        _log.warning("%s is missing: the weights of the last epoch are exported", log.folder / BEST)
        export = "last"
    chosen = best if export == "best" else log.rows[-1]
    # Read the file, because a run resumed after its last epoch does no training.
    path = log.folder / (BEST if export == "best" else LAST)
    stored = load_training_state(path, mmap=True)
    epochs = int(chosen["epoch"]) + 1
    weights = log.folder / "model.safetensors"
    # Only the exported weights were validated.
    unscored = task.run_metadata(data, epochs=epochs)
    # Kind of weights -> entry of the checkpoint; with EMA, `state_dict` has the averaged weights.
    entries = {"raw": _TRAINED, "ema": "state_dict"} if _TRAINED in stored else {}
    files = {kind: log.folder / f"model_{kind}.safetensors" for kind in entries}
    if entries:
        files[task.export_weights] = weights
    for kind, file in files.items():
        if kind != task.export_weights:
            _export_weights(task, stored[entries[kind]], file if write else None, unscored)
    # Exported last, so that the task keeps these weights.
    selected = stored[entries.get(task.export_weights, "state_dict")]
    scored = task.run_metadata(data, epochs=epochs, score=chosen[task.score])
    _export_weights(task, selected, weights if write else None, scored)
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


def set_grad_checkpointing(model: nn.Module) -> None:
    """Enable activation checkpointing: recompute activations in the backward pass.

    Raises:
        UsageError: the model does not support it.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise UsageError(f"expected a model with gradient checkpointing, got {type(model).__name__}")
    try:
        switch(True)
    # timm asserts that the model supports it.
    except AssertionError as error:
        raise UsageError(
            f"expected a model with gradient checkpointing, got {type(model).__name__}"
        ) from error


def _fit(trainer: pl.Trainer, task: LightspineTask, data: ImageDataModule, checkpoint: Path | None) -> None:
    try:
        with resource_errors():
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except LightspineError:
        raise
    # After the death of a rank, the type of the exception depends on the backend of the collective.
    except Exception as error:
        lost = _find_callback(trainer, RankWatchdog).explain(timeout_s=5.0)
        if lost is None:
            # The states of optimizer, schedule and callbacks are those of a file.
            if checkpoint is not None and not _find_callback(trainer, LastCheckpoint).has_trained:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise LightspineError(f"cannot resume from {checkpoint}: {reason}") from error
            raise
        raise LightspineError(f"{lost}, so the run was stopped") from error


def _tensorboard(folder: Path) -> TensorBoardLogger:
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise UsageError("expected the package tensorboard for --tensorboard: pip install tensorboard")
    return TensorBoardLogger(folder, name="", version="tensorboard")


def _find_callback(trainer: Any, kind: type) -> Any:
    # The attribute is missing in Lightning's type annotations.
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def _export_weights(
    task: LightspineTask, state: dict[str, Any], file: Path | None, metadata: dict[str, str]
) -> None:
    task.load_state_dict(state)
    if file is not None:
        task.save(file, metadata)
