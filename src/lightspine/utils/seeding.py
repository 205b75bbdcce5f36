"""Seeding of the global random number generators of Python, NumPy and PyTorch."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_generators(*key: int, cpu_only: bool = False) -> None:
    """Seed the generators of Python, NumPy and PyTorch from a key of non-negative integers.

    Different keys give independent random numbers, because NumPy's SeedSequence hashes the whole key. Unlike
    Lightning's `seed_everything`, no environment variable is set.

    Args:
        *key: for example (seed, epoch, image index).
        cpu_only: do not seed the generators of GPUs.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch_seed = int(words[2]) << 32 | int(words[3])
    if cpu_only:
        torch.default_generator.manual_seed(torch_seed)
    else:
        torch.manual_seed(torch_seed)


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the states of the CPU generators at the end of a block."""
    generator = torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])
