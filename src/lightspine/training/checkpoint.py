"""Checkpoints of a run: when they are written, and how a file survives a kill or a full disk."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightspine.errors import LightspineError, UsageError

BEST, LAST = "best.ckpt", "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step: at any moment the old file or the new one is there, whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside its place, onto the disk, and rename it.

        Raises:
            LightspineError: it cannot be written, such as on a full disk; the previous one stays.
        """
        if storage_options is not None:
            raise UsageError(f"expected no storage options, got {storage_options}")
        path = Path(path)
        # The same name every time: what a kill leaves behind is overwritten by the next checkpoint.
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        # torch wraps what the file raised into an error of its own.
        except (OSError, RuntimeError) as error:
            cause = _find_os_error(error)
            if cause is None:
                raise
            if part.is_file():
                part.unlink()
            kept = "; the previous one is kept" if path.is_file() else ""
            raise LightspineError(
                f"cannot write the checkpoint {path}: {cause.strerror or cause}{kept}"
            ) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, loc: storage,  # noqa: ARG005  torch's signature
        weights_only: bool | None = None,  # noqa: ARG002  never anything but True
    ) -> dict[str, Any]:
        """Return a checkpoint; code inside the file is refused."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` after every epoch and, if wanted, after so many steps.

    A checkpoint within an epoch lies behind a complete step and before anything that ends an epoch: going on
    from it repeats the rest of the epoch exactly, the validation included.

    Args:
        folder: where the file is written.
        every_n_steps: steps of the optimiser between two checkpoints within an epoch.

    Raises:
        UsageError: fewer than 1 step.
    """

    def __init__(self, folder: Path, *, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"expected a checkpoint every 1 step or more, got {every_n_steps}")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self._seen_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Take the folder of the first process, the only one that chooses it."""
        self.folder = Path(trainer.strategy.broadcast(os.fspath(self.folder)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Note the step that a resumed run begins with, which has its checkpoint."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Save if a step is complete and it is its turn."""
        # Between the batches of one step there are gradients, which no checkpoint holds.
        stepped = trainer.global_step != self._seen_step
        self._seen_step = trainer.global_step
        if self.every_n_steps is None or not stepped or trainer.global_step % self.every_n_steps:
            return
        # Lightning would go on behind the validation that is due now.
        every = trainer.val_check_batch
        validated = every is not None and (batch_idx + 1) % every == 0
        if not trainer.is_last_batch and not validated:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Save the epoch, RunLog's row included."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the validated epoch with the highest score.

    Args:
        folder: where the file is written.
        score: name of the metric.
    """

    def __init__(self, folder: Path, score: str) -> None:
        # At the end of the epoch and not of the validation, so that RunLog's row of the epoch is inside.
        super().__init__(
            folder,
            Path(BEST).stem,
            monitor=score,
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        self._validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that there is a new score."""
        super().on_validation_end(trainer, pl_module)
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the epoch if it has the best score; one without a validation is no candidate."""
        if self._validated:
            super().on_train_epoch_end(trainer, pl_module)
        self._validated = False


def _sync_folder(folder: Path) -> None:
    # Without it a power failure may forget the new name, though not the contents.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
