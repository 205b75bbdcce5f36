"""Batches of images of alike shape, so that little of a batch is padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lightspine.data.sampling import EpochSampler
from lightspine.errors import UsageError


class AspectRatioSampler(EpochSampler):
    """Orders an epoch such that upright and wide images fall into different batches of a data loader.

    The order is drawn as `EpochSampler` draws it, from seed and epoch; every batch is then filled with images
    of one group in that order. What does not fill a batch at the end of the epoch makes up the last batches,
    of which at most one per bound mixes groups. A process has the same images as without the grouping.

    Args:
        aspect_ratios: width / height of every image, (images,).
        batch_size: of the data loader that reads the order.
        bounds: ratios between the groups, ascending; by default one, between upright and wide.
        replicas: processes that share the epoch.
        rank: which of them this one is, from 0.
        seed: of the run.

    Raises:
        UsageError: a ratio that is not above 0, bounds that do not ascend, a batch size below 1.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float] | np.ndarray,
        batch_size: int,
        *,
        bounds: Sequence[float] = (1.0,),
        replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        ratios = np.asarray(aspect_ratios, dtype=np.float64)
        super().__init__(len(ratios), replicas=replicas, rank=rank, seed=seed)
        if batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1, got {batch_size}")
        if not (ratios > 0).all() or list(bounds) != sorted(set(bounds)):
            raise UsageError(f"expected ratios above 0 and ascending bounds, got bounds {list(bounds)}")
        self.batch_size = batch_size
        self.groups = np.searchsorted(np.asarray(bounds, dtype=np.float64), ratios, side="left")

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        waiting: dict[int, list[int]] = {}
        ordered: list[int] = []
        for index in super().__iter__():
            group = waiting.setdefault(int(self.groups[index]), [])
            group.append(index)
            if len(group) == self.batch_size:
                ordered += group
                group.clear()
        for number in sorted(waiting):
            ordered += waiting[number]
        return iter(ordered[start:])
