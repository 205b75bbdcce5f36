"""The folder of a run, and the checkpoint in it to go on from."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from lightspine.data.loader import ResumableLoader
from lightspine.errors import LightspineError, UsageError
from lightspine.training.checkpoint import LAST

AUTO = "auto"
"""Value of `resume`: go on from the folder's checkpoint, or begin if it has none."""


def prepare_folder(folder: str | Path, *, resume: str | Path | None = None) -> Path:
    """Return the folder of a run, which is made.

    Args:
        folder: the wanted one; with another run's files in it, `folder-2`, `folder-3`, ... is taken.
        resume: a checkpoint, whose folder is the run's; or "auto": then it is `folder` whatever is in it.
    """
    if resume is not None and resume != AUTO:
        return Path(resume).resolve().parent
    path = Path(folder)
    # The other processes of a distributed run come later than the first and are told its folder.
    if resume is None and getattr(rank_zero_only, "rank", 0) == 0:
        path = _free_neighbour(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def find_checkpoint(folder: Path, resume: str | Path | None, max_epochs: int | None) -> Path | None:
    """Return the checkpoint that `resume` means, or None where the run begins.

    Args:
        folder: of the run.
        resume: a path, "auto" or None.
        max_epochs: epochs that the run shall have in the end.

    Raises:
        UsageError: no such file, or it has all epochs behind it (with "auto" such a run is only exported).
        LightspineError: the file is no checkpoint.
    """
    if resume is None:
        return None
    path = folder / LAST if resume == AUTO else Path(resume)
    if resume == AUTO and not path.exists():
        return None
    if not path.is_file():
        raise UsageError(f"expected a checkpoint to resume from, but {path} is not a file")
    done = _finished_epochs(path)
    if resume != AUTO and max_epochs is not None and 0 <= max_epochs <= done:
        raise UsageError(
            f"expected more epochs to train, but {path} was already trained for {done} of {max_epochs} epochs"
        )
    return path


def _finished_epochs(path: Path) -> int:
    try:
        # Mapped: only the few numbers that are looked at are read.
        loops = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["loops"]
        return int(loops["fit_loop"]["epoch_progress"]["current"]["processed"])
    # torch's unpickler raises nearly anything on bytes that are no checkpoint.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LightspineError(f"cannot resume from {path}: {reason}") from error


def _free_neighbour(wanted: Path) -> Path:
    path, number = wanted, 2
    while path.exists() and (not path.is_dir() or any(path.iterdir())):
        path = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return path


class EpochState(pl.Callback):
    """Saves the position in the training data and what `self.log(..., on_epoch=True)` has summed up so far.

    Lightning keeps the sums out of its checkpoints: the training loss of a resumed epoch would be the mean of
    its later part only. The position it saves, but forgets to restore where a task has asked for
    `trainer.estimated_stepping_batches`, which most do.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._restored: dict[str, tuple[float, float]] = {}
        self._position: dict[str, int] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Note whose sums are saved."""
        self._trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Move the loader to the restored position; it has not given a batch yet."""
        position, self._position = self._position, None
        if position is not None and isinstance(trainer.train_dataloader, ResumableLoader):
            trainer.train_dataloader.load_state_dict(position)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Add the restored sums to those that the first batch has begun."""
        restored, self._restored = self._restored, {}
        for name, metric in _means(trainer).items():
            if name in restored:
                value, weight = restored[name]
                metric.value += value
                metric.cumulated_batch_size += weight

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which all processes have in common, and the sums of every process."""
        assert self._trainer is not None
        # At the end of an epoch they have served.
        done = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        sums = {
            name: (metric.value.item(), metric.cumulated_batch_size.item())
            for name, metric in (() if done else _means(self._trainer).items())
        }
        everyone = [sums]
        if dist.is_available() and dist.is_initialized():
            everyone = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, sums)
        loader = self._trainer.train_dataloader
        position = loader.state_dict() if isinstance(loader, ResumableLoader) else None
        return {"position": position, "sums": everyone}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position, and the sums of this process."""
        assert self._trainer is not None
        self._position = state_dict["position"]
        everyone = state_dict["sums"]
        # With fewer processes than before some sums would be lost, so one process takes them all.
        if len(everyone) == self._trainer.world_size:
            self._restored = everyone[self._trainer.global_rank]
        elif self._trainer.is_global_zero:
            self._restored = _total(everyone)


def _means(trainer: pl.Trainer) -> dict[str, Any]:
    # Lightning 2.6 has no public way to them.
    results = trainer.fit_loop.epoch_loop._results
    return {
        name: metric
        for name, metric in results.items()
        if metric.meta.on_epoch and metric.is_tensor and metric.meta.is_mean_reduction
    }


def _total(everyone: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    names = {name for sums in everyone for name in sums}
    return {
        name: (
            sum(sums[name][0] for sums in everyone if name in sums),
            sum(sums[name][1] for sums in everyone if name in sums),
        )
        for name in names
    }


class TrainingInterruptedError(LightspineError):
    """Ctrl-C during training; the sentence says where the last checkpoint is."""

    exit_status = 130


@contextlib.contextmanager
def report_last_checkpoint(last: Path) -> Iterator[None]:
    """Say where the last checkpoint is when a run fails or is interrupted.

    Args:
        last: where it is if there is one.

    Raises:
        TrainingInterruptedError: in place of the exception of Ctrl-C.
        LightspineError: the same sentence with the checkpoint behind it.
    """
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


def _describe(last: Path) -> str:
    if not last.is_file():
        return "no epoch was finished, so there is no checkpoint"
    return f"the last checkpoint is {last}"
