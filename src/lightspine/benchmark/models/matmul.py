"""How fast this machine multiplies matrices: what a model's arithmetic is held against."""

import statistics
from collections.abc import Callable, Sequence

import torch

# Large enough that the rate no longer grows with it, small enough to be done in a moment.
_SIDES = {"cpu": 1024, "cuda": 8192}


def matrix_product(device: str, dtype: str) -> Callable[[], object]:
    """Return a function that multiplies two square matrices into a third that is there already."""
    side = _SIDES[device]
    a, b, out = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(3))

    def run() -> None:
        torch.mm(a, b, out=out)

    return run


def product_gflops(device: str, seconds: Sequence[float]) -> float:
    """Return the rate of products that took so long: 10^9 operations per second in the median.

    A multiply-add is two operations.
    """
    return 2 * _SIDES[device] ** 3 / statistics.median(seconds) / 1e9
