"""Resume a run: its folder, its checkpoint, the mid-epoch state, and messages after an interruption."""

import contextlib
import logging
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
from lightspine.training.checkpoint import LAST, load_training_state
from lightspine.utils.folder_lock import LOCK_FILE

_log = logging.getLogger(__name__)

AUTO = "auto"
"""Value of `resume` that resumes from `last.ckpt` in the folder, if it exists."""


class TrainingInterruptedError(LightspineError):
    """Training was interrupted by Ctrl-C or a signal; the message names the last checkpoint."""

    exit_status = 130
    is_reported = False
    """Whether another rank prints the message."""


def prepare_folder(folder: str | Path, *, resume: str | Path | None = None) -> Path:
    """Create the folder of a run and return it.

    Args:
        folder: the requested folder. If it is not empty, `folder-2`, `folder-3`, ... is created instead.
        resume: a checkpoint, whose folder is used, or "auto", which uses `folder` even if it is not empty.
    """
    if resume is not None and resume != AUTO:
        return Path(resume).resolve().parent
    path = Path(folder)
    # Other ranks start when rank 0 has already written files, so rank 0 broadcasts its choice.
    if resume is None and getattr(rank_zero_only, "rank", 0) == 0:
        path = _first_free_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def find_checkpoint(folder: Path, resume: str | Path | None, max_epochs: int | None) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        folder: folder of the run.
        resume: a path, "auto" or None.
        max_epochs: total number of epochs of the run.

    Raises:
        UsageError: the file does not exist, or its run has finished `max_epochs`. With "auto" a finished run
            is exported again instead.
        LightspineError: the file is not a checkpoint.
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
    if max_epochs is not None and 0 <= max_epochs <= done:
        _log.info("the run has finished its %d epochs: only its files are written again", max_epochs)
    return path


@contextlib.contextmanager
def report_last_checkpoint(last: Path) -> Iterator[None]:
    """Add the path of the last checkpoint to the error message of a failed or interrupted run.

    Args:
        last: path of the checkpoint, which need not exist.

    Raises:
        TrainingInterruptedError: in place of KeyboardInterrupt or SystemExit.
        LightspineError: the original error, with the path appended to its message.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    # Lightning turns KeyboardInterrupt into SystemExit.
    except (KeyboardInterrupt, SystemExit) as error:
        resume = f"; resume with --resume {last}" if last.is_file() else ""
        raise TrainingInterruptedError(f"training was interrupted; {_describe_last(last)}{resume}") from error
    except UsageError:
        raise
    except LightspineError as error:
        raise LightspineError(f"{error}; {_describe_last(last)}") from error
    finally:
        # Lightning leaves SIGINT ignored for the rest of the process.
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


class EpochState(pl.Callback):
    """Saves and restores the data position and the running metric means in the middle of an epoch.

    Lightning does not save the sums of `self.log(..., on_epoch=True)`: the training loss of a resumed epoch
    would be the mean of the steps after the resume only. It saves the position of the data loader, but does
    not restore it if `trainer.estimated_stepping_batches` has been read before.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._restored: dict[str, tuple[float, float]] = {}
        self._position: dict[str, int] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Store the trainer, which `state_dict` needs."""
        self._trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Check the restored optimizer, and move the data loader to its position before its first batch."""
        for optimizer in trainer.optimizers:
            check_optimizer_state(optimizer)
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
        """Add the restored sums to the sums of the first batch."""
        restored, self._restored = self._restored, {}
        for name, metric in _running_means(trainer).items():
            if name in restored:
                value, weight = restored[name]
                metric.value += value
                metric.cumulated_batch_size += weight

    def state_dict(self) -> dict[str, Any]:
        """Return the data position, which all ranks share, and the sums of every rank."""
        assert self._trainer is not None
        # After the last batch of an epoch the sums are not needed.
        done = self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        sums = {
            name: (metric.value.item(), metric.cumulated_batch_size.item())
            for name, metric in (() if done else _running_means(self._trainer).items())
        }
        all_sums = [sums]
        if dist.is_available() and dist.is_initialized():
            all_sums = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(all_sums, sums)
        loader = self._trainer.train_dataloader
        position = loader.state_dict() if isinstance(loader, ResumableLoader) else None
        return {"position": position, "sums": all_sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the data position and the sums of this rank."""
        assert self._trainer is not None
        self._position = state_dict["position"]
        all_sums = state_dict["sums"]
        # With another number of ranks, rank 0 takes the total, so that no sum is lost.
        if len(all_sums) == self._trainer.world_size:
            self._restored = all_sums[self._trainer.global_rank]
        elif self._trainer.is_global_zero:
            self._restored = _add_sums(all_sums)


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Check that the state of a fused optimizer fits its parameters: its kernels do not check bounds.

    A tensor of other strides than its parameter, which may have fewer values in memory, is copied.

    Raises:
        LightspineError: a tensor has neither the shape of its parameter nor a single value.
    """
    fused = [group for group in optimizer.param_groups if group.get("fused")]
    for parameter in (parameter for group in fused for parameter in group["params"]):
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                continue
            if value.shape != parameter.shape:
                raise LightspineError(
                    f"the checkpoint has {name} of shape {tuple(value.shape)} in the state of the optimizer "
                    f"for a parameter of shape {tuple(parameter.shape)}"
                )
            if value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _running_means(trainer: pl.Trainer) -> dict[str, Any]:
    # Lightning 2.6 has no public access to them.
    results = trainer.fit_loop.epoch_loop._results
    return {
        name: metric
        for name, metric in results.items()
        if metric.meta.on_epoch and metric.is_tensor and metric.meta.is_mean_reduction
    }


def _add_sums(all_sums: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    names = {name for sums in all_sums for name in sums}
    return {
        name: (
            sum(sums[name][0] for sums in all_sums if name in sums),
            sum(sums[name][1] for sums in all_sums if name in sums),
        )
        for name in names
    }


def _finished_epochs(path: Path) -> int:
    # mmap reads only the few bytes that are used.
    loops = load_training_state(path, mmap=True)["loops"]
    try:
        return int(loops["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (LookupError, TypeError) as error:
        raise LightspineError(f"cannot resume from {path}: it has no number of finished epochs") from error


def _first_free_folder(folder: Path) -> Path:
    path, number = folder, 2
    while path.exists() and not (path.is_dir() and all(file.name == LOCK_FILE for file in path.iterdir())):
        path = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return path


def _describe_last(last: Path) -> str:
    if not last.is_file():
        return "no epoch was finished, so there is no checkpoint"
    return f"the last checkpoint is {last}"
