"""Samplers whose order depends only on seed, epoch and rank."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from lightspine.errors import UsageError

# DeiT and timm round the length of an epoch with repeated augmentation down to a multiple of this.
_ROUND_TO = 256


class EpochSampler(DistributedSampler[Any]):
    """Distributed sampler with repeated augmentation that can start in the middle of an epoch.

    Without repeats every image comes once per epoch, in the order of torch's DistributedSampler for the same
    seed; if the images cannot be divided evenly between the processes, the first ones come twice. With
    repeats (repeated augmentation, as in DeiT) every image comes up to `repeats` times in succession, so that
    different processes see different augmentations of it, and an epoch has as many steps as without. The
    order is that of timm's RepeatAugSampler for seed 0, and an index is a pair (image, repeat).

    With `epoch_size` the images come from an endless sequence of permutations of the dataset, and an epoch is
    the next `epoch_size` of them: a small dataset is repeated within an epoch, and a large one is spread over
    several. An index is then a pair (image, number of the permutation in the epoch).

    It derives from DistributedSampler because Lightning replaces any other sampler by one.

    Args:
        length: number of images in the dataset.
        num_replicas: number of processes that share the epoch.
        rank: index of this process.
        seed: seed of the run.
        repeats: copies of an image in an epoch.
        shuffle: draw a new order in every epoch; otherwise the images come in the order of their indices.
        num_samples: number of indices for this process. Default: its whole share without repeats; with
            repeats, its share of `length` rounded down to a multiple of 256 (not rounded below 256 images).

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        length: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeats: int = 1,
        shuffle: bool = True,
        num_samples: int | None = None,
        epoch_size: int | None = None,
    ) -> None:
        if length < 1:
            raise UsageError(f"expected at least 1 image, got {length}")
        if repeats < 1:
            raise UsageError(f"expected repeats of at least 1, got {repeats}")
        if not 0 <= rank < num_replicas:
            raise UsageError(f"expected a rank from 0 to {num_replicas - 1}, got {rank}")
        if epoch_size is not None and epoch_size < 1:
            raise UsageError(f"expected an epoch of at least 1 image, got {epoch_size}")
        if epoch_size is not None and (repeats > 1 or not shuffle):
            raise UsageError(
                "expected shuffle and no repeats with an epoch size, got "
                f"shuffle={shuffle} and repeats={repeats}"
            )
        # The base class only uses the length of its dataset.
        super().__init__(range(length), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.length = length
        self.repeats = repeats
        self.epoch_size = epoch_size
        share = -(-(epoch_size or length) * repeats // num_replicas)
        if num_samples is None:
            num_samples = share if repeats == 1 else _samples_with_repeats(length, num_replicas)
        if not 0 < num_samples <= share:
            raise UsageError(f"expected num_samples from 1 to {share}, got {num_samples}")
        self.num_samples = num_samples
        self._start = 0

    def __len__(self) -> int:
        return self.num_samples

    def start_at(self, offset: int) -> None:
        """Skip the first `offset` indices in the next iteration only."""
        if not 0 <= offset <= self.num_samples:
            raise UsageError(f"expected an offset from 0 to {self.num_samples}, got {offset}")
        self._start = offset

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        positions = np.arange(
            self.rank + start * self.num_replicas, self.num_samples * self.num_replicas, self.num_replicas
        )
        if self.epoch_size is not None:
            return iter(self._draw(positions % self.epoch_size))
        positions %= self.length * self.repeats
        order = self._permutation(self.epoch) if self.shuffle else np.arange(self.length)
        images = order[positions // self.repeats].tolist()
        if self.repeats == 1:
            return iter(images)
        return iter(list(zip(images, (positions % self.repeats).tolist(), strict=True)))

    def _draw(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """Return image and permutation at positions of the epoch."""
        assert self.epoch_size is not None
        first, skipped = divmod(self.epoch * self.epoch_size, self.length)
        number = -(-(skipped + self.epoch_size) // self.length)
        order = np.concatenate([self._permutation(first + added) for added in range(number)])
        places = positions + skipped
        return list(zip(order[places].tolist(), (places // self.length).tolist(), strict=True))

    def _permutation(self, number: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed + number)
        return torch.randperm(self.length, generator=generator).numpy()


class AspectRatioSampler(EpochSampler):
    """Group images of similar aspect ratio into the same batch, so that batching adds little padding.

    The epoch is shuffled as in `EpochSampler`; images of each group then fill batches in that order. The
    incomplete batches that remain at the end of the epoch are concatenated by group, so at most one batch per
    bound mixes groups. Grouping does not change which images a process gets.

    Args:
        aspect_ratios: width / height of every image, (images,).
        batch_size: batch size of the data loader.
        bounds: aspect ratios that separate the groups, ascending; by default portrait and landscape.
        num_replicas: number of processes that share the epoch.
        rank: index of this process.
        seed: seed of the run.
        epoch_size: see `EpochSampler`.

    Raises:
        UsageError: an aspect ratio that is not above 0, bounds that do not ascend, a batch size below 1.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float] | np.ndarray,
        batch_size: int,
        *,
        bounds: Sequence[float] = (1.0,),
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        epoch_size: int | None = None,
    ) -> None:
        ratios = np.asarray(aspect_ratios, dtype=np.float64)
        super().__init__(len(ratios), num_replicas=num_replicas, rank=rank, seed=seed, epoch_size=epoch_size)
        if batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1, got {batch_size}")
        if not (ratios > 0).all() or list(bounds) != sorted(set(bounds)):
            raise UsageError(f"expected ratios above 0 and ascending bounds, got bounds {list(bounds)}")
        self.batch_size = batch_size
        self.groups = np.searchsorted(np.asarray(bounds, dtype=np.float64), ratios, side="left")

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        incomplete: dict[int, list[Any]] = {}
        ordered: list[Any] = []
        for index in super().__iter__():
            image = index if self.epoch_size is None else index[0]
            batch = incomplete.setdefault(int(self.groups[image]), [])
            batch.append(index)
            if len(batch) == self.batch_size:
                ordered += batch
                batch.clear()
        for group in sorted(incomplete):
            ordered += incomplete[group]
        return iter(ordered[start:])


def _samples_with_repeats(length: int, num_replicas: int) -> int:
    if length < _ROUND_TO:
        return -(-length // num_replicas)
    return length // _ROUND_TO * _ROUND_TO // num_replicas
