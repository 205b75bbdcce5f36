"""A data loader that goes on in the middle of an epoch."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lightspine.data.sampling import EpochSampler
from lightspine.data.seeding import SeededDataset
from lightspine.errors import UsageError


class ResumableLoader(DataLoader):
    """A data loader whose position can be saved and restored; Lightning does so with every checkpoint.

    It begins at the first batch that is asked for and not at `iter()`: Lightning calls `iter()` before it has
    told the epoch of a resumed run to the sampler. The images that were seen before are not read again where
    the sampler is an `EpochSampler`; any other sampler must give the same order again.

    Args:
        *args: see torch's DataLoader.
        **kwargs: see torch's DataLoader.

    Attributes:
        epoch: the sampler's epoch, counted from 0.

    Raises:
        UsageError: persistent workers, which would never hear of a new epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.persistent_workers:
            raise UsageError("expected persistent_workers=False: the epoch reaches workers when they start")
        self._position = 0
        self._restored: tuple[int, int] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration, as it was told to the sampler."""
        return int(getattr(self.sampler, "epoch", 0))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own class
        """Yield the batches of the sampler's epoch, from the restored position if it is of this epoch."""
        epoch, start = self._restored or (0, 0)
        self._restored = None
        if epoch != self.epoch:
            start = 0
        if isinstance(self.dataset, SeededDataset):
            self.dataset.set_epoch(self.epoch)
        self._position = start
        if start and isinstance(self.sampler, EpochSampler):
            if self.batch_size is None:
                raise UsageError("expected a batch_size to go on in the middle of an epoch, got none")
            self.sampler.start_at(min(start * self.batch_size, len(self.sampler)))
            start = 0
        for batch in islice(super().__iter__(), start, None):
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches have been handed out."""
        return {"epoch": self.epoch, "batch": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin where the state was taken, if it is one of the same epoch."""
        self._restored = state["epoch"], state["batch"]
