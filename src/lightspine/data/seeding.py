"""Augmentation as a pure function of the run's seed, the epoch, the image and its repeat."""

import contextlib
import random
from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededDataset(Dataset[Any]):
    """Reads another dataset with Python's, numpy's and torch's generators seeded anew for every image.

    What an image looks like after its augmentation then depends on (seed, epoch, index, repeat) alone: not on
    the number of worker processes, the batch it falls into or where a resumed run took up its work.

    The epoch reaches worker processes when they are started, so a loader must start them anew in every epoch.

    Args:
        dataset: a map-style dataset with random transforms.
        seed: of the run.

    Attributes:
        epoch: set by `set_epoch`; 0 at first.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, counted from 0, that the next images are read for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        """Return the item of an index, or of (index, repeat) where an epoch holds an image several times."""
        position, repeat = index if isinstance(index, tuple) else (index, 0)
        with seeded_generators(self.seed, self.epoch, position, repeat):
            return self.dataset[position]


@contextlib.contextmanager
def seeded_generators(*key: int) -> Iterator[None]:
    """Seed the three CPU generators from a key of non-negative numbers; the old states come back at the end.

    Different keys give unrelated random numbers: numpy's SeedSequence mixes them.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    # The generator by itself: `torch.manual_seed` would seed every GPU too, which no transform needs.
    generator = torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    generator.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])
