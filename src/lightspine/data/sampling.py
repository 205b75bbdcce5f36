"""Which images an epoch shows and in which order: a function of (seed, epoch, rank) and of nothing else."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from lightspine.errors import UsageError

# An epoch with repeats is cut to a multiple of this many images, as DeiT does and timm after it.
_ROUND = 256


class EpochSampler(DistributedSampler[Any]):
    """Gives the indices of one epoch to one of several processes.

    Without repeats every image comes once; the first ones come again where the processes could not share the
    images evenly. The order is that of torch's DistributedSampler for the same seed. With repeats every image
    comes up to `repeats` times in succession, so that different processes see differently augmented copies of
    it, and an epoch still has as many steps as without: DeiT's repeated augmentation, in the order of timm's
    RepeatAugSampler for seed 0. An index is then a pair (image, repeat).

    It derives from DistributedSampler because Lightning puts one of its own in the place of any other.

    Args:
        length: images of the data set.
        replicas: processes that share the epoch.
        rank: which of them this one is, from 0.
        seed: of the run.
        repeats: copies of an image in an epoch.
        shuffle: draw the order anew in every epoch; without it the images come by their index.
        keep: how many indices this process gets; all of its share without repeats and, with them, a
            replica's share of `length` rounded down to a multiple of 256 (not rounded below 256 images).

    Raises:
        UsageError: a value out of its range.
    """

    def __init__(
        self,
        length: int,
        *,
        replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeats: int = 1,
        shuffle: bool = True,
        keep: int | None = None,
    ) -> None:
        if length < 1:
            raise UsageError(f"expected at least 1 image, got {length}")
        if repeats < 1:
            raise UsageError(f"expected repeats of at least 1, got {repeats}")
        if not 0 <= rank < replicas:
            raise UsageError(f"expected a rank from 0 to {replicas - 1}, got {rank}")
        super().__init__(range(length), num_replicas=replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]  # its length is all that is asked for
        self.length = length
        self.repeats = repeats
        share = -(-length * repeats // replicas)
        if keep is None:
            keep = share if repeats == 1 else _kept_with_repeats(length, replicas)
        if not 0 < keep <= share:
            raise UsageError(f"expected keep from 1 to {share}, got {keep}")
        self.keep = keep
        self._start = 0

    def __len__(self) -> int:
        return self.keep

    def start_at(self, offset: int) -> None:
        """Let the next iteration, and only that one, begin behind the first `offset` indices."""
        if not 0 <= offset <= self.keep:
            raise UsageError(f"expected an offset from 0 to {self.keep}, got {offset}")
        self._start = offset

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        positions = np.arange(
            self.rank + start * self.num_replicas, self.keep * self.num_replicas, self.num_replicas
        )
        positions %= self.length * self.repeats
        images = self._order()[positions // self.repeats].tolist()
        if self.repeats == 1:
            return iter(images)
        return iter(list(zip(images, (positions % self.repeats).tolist(), strict=True)))

    def _order(self) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.length)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.length, generator=generator).numpy()


def _kept_with_repeats(length: int, replicas: int) -> int:
    if length < _ROUND:
        return -(-length // replicas)
    return length // _ROUND * _ROUND // replicas
