"""One training run from start to end: the same function serves the command line and a call from Python."""

import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import TensorBoardLogger

from lightspine.data.modules import ImageDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.training.base import LightspineTask
from lightspine.training.checkpoints import LAST, AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from lightspine.training.epoch_state import EpochState
from lightspine.training.finetuning import describe_start
from lightspine.training.interruption import TrainingInterruptedError, naming_last_checkpoint
from lightspine.training.last_validation import LastValidation
from lightspine.training.peers import PeerWatch
from lightspine.training.progress import RunProgressBar, has_terminal
from lightspine.training.quiet import quiet_lightning
from lightspine.training.results import Export, TrainResult, finish
from lightspine.training.resume import find_checkpoint, prepare_folder
from lightspine.training.run_log import RunLog
from lightspine.training.scale import EffectiveBatch, set_grad_checkpointing

__all__ = ["Export", "TrainResult", "TrainingInterruptedError", "run_callbacks", "run_training", "train"]

_log = logging.getLogger(__name__)

# A quiet, plain run; every one of them can be set on the command line.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "logger": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


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
        effective_batch: images per step over all devices, reached by accumulation (see `EffectiveBatch`).
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
    with quiet_lightning():
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
    with quiet_lightning(), naming_last_checkpoint(log.folder / LAST):
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
    callbacks: list[pl.Callback] = [PeerWatch()]
    if effective_batch is not None:
        callbacks.append(EffectiveBatch(effective_batch))
    callbacks += [
        RunLog(folder, announce=progress and not live),
        EpochState(),
        LastValidation(),
        # Two of them: Lightning's save_last leaves out the epochs that are not the best. The last one comes
        # last: its file holds the state of the other.
        BestCheckpoint(folder, score),
        LastCheckpoint(folder, every_n_steps=save_every_steps),
    ]
    if progress and live:
        callbacks.append(RunProgressBar())
    return callbacks


def _fit(trainer: pl.Trainer, task: LightspineTask, data: ImageDataModule, checkpoint: Path | None) -> None:
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except LightspineError:
        raise
    # What a collective operation says when another process is gone depends on the backend.
    except Exception as error:
        lost = _callback(trainer, PeerWatch).explain(timeout_s=5.0)
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
