"""One training run from start to end: the same function serves the command line and a call from Python."""

import contextlib
import logging
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, RichProgressBar

from lightspine.data.modules import ImageDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.models._saving import save_checkpoint
from lightspine.tasks.classification import ClassificationTask
from lightspine.tasks.run_log import RunLog, plot_curves

Export = Literal["last", "best"]

BEST, LAST = "best.ckpt", "last.ckpt"

# A quiet, plain run; every one of them can be set on the command line.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 10,
    "logger": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class TrainingInterruptedError(LightspineError):
    """Ctrl-C during training; the sentence says where the last checkpoint is."""

    exit_status = 130


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        model: name of the model.
        folder: everything below lies here, with `metrics.csv` and `curves.png`.
        weights: the exported model, for `evaluate`, `predict` and `lightspine.create_model`.
        last_checkpoint: full state of training after the last epoch, to resume from.
        best_checkpoint: the same after the epoch with the best validation accuracy.
        accuracy: top-1 accuracy in percent of the exported weights on the held-out images.
        best_accuracy: the highest of any epoch. Chosen on the images it is measured on, so it flatters.
        seconds: duration of this call of the training, validation included.
        history: one dictionary per epoch: epoch, seconds, train_loss, val_loss, val_top1, lr, ...
        skipped: path -> reason of the images that could not be used.
    """

    model: str
    folder: Path
    weights: Path
    last_checkpoint: Path
    best_checkpoint: Path
    accuracy: float
    best_accuracy: float
    seconds: float
    history: list[dict[str, float]] = field(repr=False)
    skipped: dict[str, str] = field(repr=False)


def train(
    task: ClassificationTask,
    data: ImageDataModule,
    *,
    folder: str | Path,
    epochs: int = 10,
    resume: str | Path | None = None,
    export: Export = "last",
    ema_decay: float | None = None,
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
        resume: a `last.ckpt` of an earlier run to go on from, in the same folder.
        export: save the weights of the last epoch, or of the one that scored best on the held-out images.
        ema_decay: average the weights exponentially, per step; the averaged ones are validated and exported.
        gradient_clip: largest norm of the gradient.
        accelerator: Lightning's name of the device kind: "cpu", "gpu", "mps" or "auto".
        precision: Lightning's name of the number format, such as "bf16-mixed".
        progress: show a live bar in a terminal, or a line per epoch on the standard error elsewhere.
        **trainer_options: anything else that Lightning's Trainer takes.

    Returns:
        The paths and scores of the run.

    Raises:
        UsageError: the class counts differ, or `resume` is no file.
        LightspineError: the loss diverged, no image can be read, or the checkpoint is damaged.
        TrainingInterruptedError: Ctrl-C.
    """
    folder = prepare_folder(folder, resume=resume)
    callbacks = run_callbacks(folder, progress=progress, live=has_terminal())
    if ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=ema_decay))
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
    return run_training(trainer, task, data, resume=resume, export=export)


def run_training(
    trainer: pl.Trainer,
    task: ClassificationTask,
    data: ImageDataModule,
    *,
    resume: str | Path | None = None,
    export: Export = "last",
) -> TrainResult:
    """Train with a trainer that has the callbacks of `run_callbacks`; see `train`."""
    if data.num_classes != task.top1.num_classes:
        raise UsageError(f"expected a task with {data.num_classes} classes, got {task.top1.num_classes}")
    if resume is not None:
        _check_resume(Path(resume), trainer.max_epochs)
    log = next(callback for callback in _callbacks(trainer) if isinstance(callback, RunLog))
    started = time.perf_counter()
    with quiet_lightning(), _naming_last_checkpoint(log.folder / LAST):
        trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    seconds = time.perf_counter() - started

    best = max(log.rows, key=lambda row: row["val_top1"])
    chosen = log.rows[-1]
    if export == "best":
        chosen = best
        state = torch.load(log.folder / BEST, map_location="cpu", weights_only=True)["state_dict"]
        task.load_state_dict(state)
    weights = log.folder / "model.safetensors"
    if trainer.is_global_zero:
        save_checkpoint(
            task.model,
            weights,
            class_names=data.class_names,
            preprocessing=data.preprocessing.to_dict(),
            metadata={
                "val_top1": f"{chosen['val_top1']:.2f}",
                "epochs": str(len(log.rows)),
                "seed": str(task.seed),
            },
        )
        plot_curves(log.folder / "curves.png", log.rows, task.model_name)
    return TrainResult(
        model=task.model_name,
        folder=log.folder,
        weights=weights,
        last_checkpoint=log.folder / LAST,
        best_checkpoint=log.folder / BEST,
        accuracy=chosen["val_top1"],
        best_accuracy=best["val_top1"],
        seconds=seconds,
        history=log.rows,
        skipped=dict(task.skipped),
    )


def run_callbacks(folder: Path, *, progress: bool, live: bool) -> list[pl.Callback]:
    """Return the callbacks that every run has: checkpoints, the log and, if asked for, the progress bar."""
    callbacks: list[pl.Callback] = [
        RunLog(folder, announce=progress and not live),
        # Two of them: Lightning's save_last leaves out the epochs that are not the best. The last one comes
        # last: its file holds the state of the other.
        _saver(folder, BEST, monitor="val_top1", mode="max"),
        _saver(folder, LAST),
    ]
    if progress and live:
        callbacks.append(RichProgressBar(leave=False))
    return callbacks


def _saver(folder: Path, name: str, **options: Any) -> ModelCheckpoint:
    # At the end of the epoch and not of the validation, so that RunLog's row of the epoch is inside.
    return ModelCheckpoint(
        folder, Path(name).stem, enable_version_counter=False, save_on_train_epoch_end=True, **options
    )


def prepare_folder(folder: str | Path, *, resume: str | Path | None = None) -> Path:
    """Return the folder of a run: the resumed checkpoint's, else `folder`, or `folder-2`, ... if taken."""
    if resume is not None:
        return Path(resume).resolve().parent
    wanted = Path(folder)
    path, number = wanted, 2
    while path.exists() and (not path.is_dir() or any(path.iterdir())):
        path = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notes and the warnings that do not concern a user's run to itself."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # In-memory data needs no workers; a resumed run finds its folder full on purpose.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
        # Between Lightning and what it builds on (torch, jsonargparse): a caller cannot change it.
        warnings.filterwarnings(
            "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
        )
        warnings.filterwarnings("ignore", message=r"\s*By default only one JsonargparseDeprecationWarning")
        warnings.filterwarnings(
            "ignore", message=r"(?s).*deprecated\s+in\s+v4\.", category=DeprecationWarning
        )
        warnings.filterwarnings("ignore", message="(GPU|TPU|MPS) available but not used.*")
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _naming_last_checkpoint(last: Path) -> Iterator[None]:
    """Say where the last checkpoint is when a run fails or is interrupted."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    # Lightning ends the process at Ctrl-C instead of passing it on.
    except (KeyboardInterrupt, SystemExit) as error:
        resume = f"; go on with --resume {last}" if last.is_file() else ""
        raise TrainingInterruptedError(f"training was interrupted; {_describe(last)}{resume}") from error
    except UsageError:
        raise
    except LightspineError as error:
        raise LightspineError(f"{error}; {_describe(last)}") from error
    finally:
        # Lightning leaves Ctrl-C switched off for the rest of the process.
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _check_resume(path: Path, max_epochs: int | None) -> None:
    if not path.is_file():
        raise UsageError(f"expected a checkpoint to resume from, but {path} is not a file")
    try:
        # Mapped: only the few numbers that are looked at are read.
        done = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
    # torch's unpickler raises nearly anything on bytes that are no checkpoint.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LightspineError(f"cannot resume from {path}: {reason}") from error
    if max_epochs is not None and 0 <= max_epochs <= done:
        raise UsageError(
            f"expected more epochs to train, but {path} was already trained for {done} of {max_epochs} epochs"
        )


def _describe(last: Path) -> str:
    if not last.is_file():
        return "no epoch was finished, so there is no checkpoint"
    return f"the last checkpoint is {last}"


def _callbacks(trainer: Any) -> list[pl.Callback]:
    # An attribute that Lightning's type annotations do not know.
    return list(trainer.callbacks)


def has_terminal() -> bool:
    """Return whether a live bar can be drawn."""
    return sys.stderr.isatty() and shutil.get_terminal_size().columns > 40
