"""Cached device tensors that kernels read, such as scan orders; apart from `launch`, which needs Triton."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

_Collected = TypeVar("_Collected", bound=Tensor)
_lists: list[list[Tensor]] = []


@contextmanager
def collect_constants() -> Iterator[list[Tensor]]:
    """Collect the kept tensors that kernels read in the block.

    A captured CUDA graph reads their memory again at every replay, while the caches may drop them.
    """
    collected: list[Tensor] = []
    _lists.append(collected)
    try:
        yield collected
    finally:
        _lists[:] = [entry for entry in _lists if entry is not collected]


def use_constant(tensor: _Collected) -> _Collected:
    """Return a kept tensor that a launch is about to read."""
    for collected in _lists:
        collected.append(tensor)
    return tensor
