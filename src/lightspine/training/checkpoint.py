"""Checkpoint callbacks for `last.ckpt` and `best.ckpt`, and atomic checkpoint writes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import load_pickled

BEST, LAST = "best.ckpt", "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """CheckpointIO with atomic writes: a complete old or new file exists at any time."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a temporary file, flush it to disk, and rename it.

        Raises:
            LightspineError: the file cannot be written, for example on a full disk. The previous checkpoint
                is kept.
        """
        if storage_options is not None:
            raise UsageError(f"expected no storage options, got {storage_options}")
        path = Path(path)
        # A fixed name, so that the next checkpoint replaces the partial file of a killed process.
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not through a link, which somebody else's folder may have there.
            part.unlink(missing_ok=True)
            with part.open("xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        # torch.save wraps the file's OSError into a RuntimeError.
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
        map_location: Callable | None = None,  # noqa: ARG002  always the CPU
        weights_only: bool | None = None,  # noqa: ARG002  always True
    ) -> dict[str, Any]:
        """Load a checkpoint without running code in it, as `load_pickled` does."""
        content: dict[str, Any] = load_pickled(Path(path))
        return content


def load_training_state(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load the checkpoint of a run, which may be that of somebody else.

    Args:
        path: the file.
        mmap: read the tensors when they are used.

    Raises:
        LightspineError: the file is no complete checkpoint, would execute code, or is not that of a run.
    """
    try:
        stored = load_pickled(path, mmap=mmap)
    except LightspineError as error:
        raise LightspineError(f"cannot resume from {path}: {error}") from error
    entries = ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers")
    if not isinstance(stored, dict) or not all(name in stored for name in entries):
        raise LightspineError(f"cannot resume from {path}: it is not the checkpoint of a training run")
    if not isinstance(stored["callbacks"], dict) or not _are_tensors(stored["state_dict"]):
        raise LightspineError(
            f"cannot resume from {path}: its weights or the states of its callbacks are damaged"
        )
    if not _are_counts(stored["loops"]):
        raise LightspineError(f"cannot resume from {path}: its numbers of epochs and batches are damaged")
    return stored


def _are_tensors(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())


def _are_counts(state: Any) -> bool:
    """Return whether nested dictionaries and lists hold nothing but integers that 64 bits can have."""
    if isinstance(state, dict | list | tuple):
        return all(map(_are_counts, state.values() if isinstance(state, dict) else state))
    return state is None or (isinstance(state, int) and abs(state) < 2**63)


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` after every epoch and, optionally, every n steps.

    A checkpoint within an epoch is written after a complete optimizer step and before validation. A run that
    is resumed from it repeats the rest of the epoch exactly.

    Args:
        folder: folder of the file.
        every_n_steps: optimizer steps between checkpoints within an epoch.

    Attributes:
        has_trained: whether a batch has been trained on in this process.

    Raises:
        UsageError: `every_n_steps` is below 1.
    """

    def __init__(self, folder: Path, *, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"expected a checkpoint every 1 step or more, got {every_n_steps}")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.has_trained = False
        self._seen_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Broadcast the folder from rank 0."""
        self.folder = Path(trainer.strategy.broadcast(os.fspath(self.folder)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Record the first step; a resumed run already has its checkpoint."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Save after every n-th complete step."""
        self.has_trained = True
        # Within an accumulated step there are gradients, which checkpoints do not store.
        stepped = trainer.global_step != self._seen_step
        self._seen_step = trainer.global_step
        if self.every_n_steps is None or not stepped or trainer.global_step % self.every_n_steps:
            return
        # A run resumed here would skip the validation that follows this batch.
        every = trainer.val_check_batch
        validated = every is not None and (batch_idx + 1) % every == 0
        if not trainer.is_last_batch and not validated:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Save after the epoch, when RunLog has added its row."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)


class BestCheckpoint(ModelCheckpoint):
    """Saves `best.ckpt` after the epoch with the highest validation score.

    Args:
        folder: folder of the file.
        score: name of the monitored metric.
    """

    def __init__(self, folder: Path, score: str) -> None:
        # Save after the epoch and not after the validation, so that the file has RunLog's row of the epoch.
        super().__init__(
            folder,
            Path(BEST).stem,
            monitor=score,
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        self._validated = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, also if the folder of the run was moved or copied.

        Lightning would forget the score there, and replace `best.ckpt` by that of a worse epoch.
        """
        assert self.dirpath is not None
        path = os.path.join(self.dirpath, BEST)
        here: dict[str, Any] = {"dirpath": self.dirpath}
        for name in ("best_model_path", "kth_best_model_path"):
            here[name] = path if state_dict[name] else ""
        # A single file is kept, that of the best epoch.
        here["best_k_models"] = {path: state_dict["kth_value"]} if state_dict["best_k_models"] else {}
        super().load_state_dict(state_dict | here)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that this epoch has a score."""
        super().on_validation_end(trainer, pl_module)
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the epoch was validated and has the best score."""
        if self._validated:
            super().on_train_epoch_end(trainer, pl_module)
        self._validated = False


def forget_foreign_files(callbacks: dict[str, Any], folder: Path) -> None:
    """Remove the paths outside a run's folder from the states of its checkpoint callbacks, in place.

    `ModelCheckpoint` deletes the files that its state names: a checkpoint of somebody else must name none.
    `BestCheckpoint` replaces its paths itself.

    Args:
        callbacks: the entry "callbacks" of a checkpoint.
        folder: folder of the run.
    """
    for name, state in callbacks.items():
        if name.startswith(BestCheckpoint.__name__) or not isinstance(state, dict):
            continue
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if key in state and not _is_file_of(folder, state[key]):
                state[key] = ""
        if isinstance(files := state.get("best_k_models"), dict):
            state["best_k_models"] = {
                path: score for path, score in files.items() if _is_file_of(folder, path)
            }


def _is_file_of(folder: Path, path: Any) -> bool:
    # An address such as local:///home becomes a path below the current folder.
    return (
        isinstance(path, str)
        and Path(path).suffix == ".ckpt"
        and folder.resolve() in Path(path).resolve().parents
    )


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself survive a power failure.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
