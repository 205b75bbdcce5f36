"""Data loader that resumes in the middle of an epoch, with reproducible augmentation."""

import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from lightspine.data.samplers import EpochSampler
from lightspine.errors import UsageError
from lightspine.utils.interrupts import interrupts_blocked
from lightspine.utils.resource_errors import WorkerDiedError, resource_errors, watch_workers, worker_message
from lightspine.utils.seeding import preserved_generators, seed_generators


class SeededDataset(Dataset[Any]):
    """Wrap a dataset so that the augmentation of an image depends only on (seed, epoch, index, repeat).

    Python's, NumPy's and PyTorch's generators are seeded for every image. The augmentation therefore does not
    depend on the number of workers, on the batch of the image or the position at which a run was resumed.

    Workers receive the epoch when they start, so a loader must start new ones in every epoch.

    Args:
        dataset: map-style dataset with random transforms.
        seed: seed of the run.

    Attributes:
        epoch: set by `set_epoch`; 0 initially.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        """Return the item of an index, or of a pair (index, repeat) with repeated augmentation."""
        (item,) = self.__getitems__([index])
        return item

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[Any]:
        """Return the items of a batch of indices; PyTorch's data loader prefers it to `__getitem__`."""
        items = []
        # Once per batch, because saving and restoring the states takes several times as long as seeding.
        with preserved_generators():
            for index in indices:
                position, repeat = index if isinstance(index, tuple) else (index, 0)
                seed_generators(self.seed, self.epoch, position, repeat, cpu_only=True)
                items.append(self.dataset[position])
        return items


class WatchedLoader(DataLoader):
    """DataLoader that stops with a LightspineError at the next batch after a worker died.

    torch's loader goes on with the batches that were already loaded, and raises its own error from a signal
    handler, where other code may swallow it.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch declares its own iterator class
        """Yield the batches.

        Raises:
            LightspineError: a worker died, or there is not enough memory.
        """
        # At Ctrl-C this process ends the workers.
        with resource_errors(), interrupts_blocked() if self.num_workers else nullcontext():
            batches = super().__iter__()
        watch_workers(batches)
        while True:
            with resource_errors():
                try:
                    batch = next(batches, _END)
                # A worker may die while a tensor is received from it.
                except (OSError, EOFError):
                    _check_workers(batches, timeout_s=1.0)
                    raise
                _check_workers(batches)
            if batch is _END:
                return
            yield batch


_END = object()


def _check_workers(batches: Any, timeout_s: float = 0.0) -> None:
    """Check that the workers which still have batches to load are alive; wait so long for their end."""
    workers = zip(getattr(batches, "_workers", ()), getattr(batches, "_workers_status", ()), strict=False)
    watched = [worker for worker, expected in workers if expected]
    deadline = time.monotonic() + timeout_s
    while not (dead := [str(worker.pid) for worker in watched if not worker.is_alive()]):
        if time.monotonic() >= deadline:
            return
        time.sleep(0.01)
    raise WorkerDiedError(worker_message(", ".join(dead)))


class ResumableLoader(WatchedLoader):
    """DataLoader that saves and restores its position; Lightning does so with every checkpoint.

    Reading starts at the first `next()` instead of at `iter()`, because Lightning calls `iter()` before it
    sets the epoch of a resumed run on the sampler. With an `EpochSampler` the images before the restored
    position are not read again; any other sampler must produce the same order again.

    Args:
        *args: see torch's DataLoader.
        **kwargs: see torch's DataLoader.

    Attributes:
        epoch: epoch of the sampler, counted from 0.

    Raises:
        UsageError: persistent workers, which would not receive the epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.persistent_workers:
            raise UsageError("expected persistent_workers=False: workers receive the epoch when they start")
        self._position = 0
        self._restored: tuple[int, int] | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next iteration, as set on the sampler."""
        return int(getattr(self.sampler, "epoch", 0))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch declares its own iterator class
        """Yield the batches of the epoch, from the restored position if it belongs to this epoch."""
        epoch, start = self._restored or (0, 0)
        self._restored = None
        if epoch != self.epoch:
            start = 0
        if isinstance(self.dataset, SeededDataset):
            self.dataset.set_epoch(self.epoch)
        self._position = start
        if start and isinstance(self.sampler, EpochSampler):
            if self.batch_size is None:
                raise UsageError("expected a batch_size to resume in the middle of an epoch, got none")
            self.sampler.start_at(min(start * self.batch_size, len(self.sampler)))
            start = 0
        for batch in islice(super().__iter__(), start, None):
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of batches delivered in it."""
        return {"epoch": self.epoch, "batch": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position; it applies to the next iteration if the epoch is the same."""
        self._restored = state["epoch"], state["batch"]
