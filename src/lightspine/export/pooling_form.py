"""What stands for pooling to a grid in a file: products with matrices that are made for the size at hand.

PyTorch's exporter writes down the windows of the size that it traced, in which other sizes come out wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pooling_table() -> dict[Any, Callable[..., Any]]:
    """Return the functions that replace pooling to a grid in an exported program."""
    return {torch.ops.aten.adaptive_avg_pool2d.default: _average_pool}


def _average_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    rows, columns = (
        _windows(length, count, x) for length, count in zip(x.shape[2:], output_size, strict=True)
    )
    return rows @ x @ columns.t()


def _windows(length: int, count: int, like: Tensor) -> Tensor:
    """Return the share of each position in each of the windows, which overlap: (count, length).

    The length may be a symbol of the tracer.
    """
    window = torch.arange(count, device=like.device).unsqueeze(1)
    starts = window * length // count
    ends = ((window + 1) * length + count - 1) // count
    positions = torch.arange(length, device=like.device)
    inside = torch.logical_and(positions >= starts, positions < ends)
    return inside.to(like.dtype) / (ends - starts).to(like.dtype)
