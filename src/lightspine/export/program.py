"""Trace a network into a program of PyTorch's exporter, with free sizes or fixed ones."""

import warnings
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lightspine.errors import LightspineError, UsageError

MIN_SIDE = 32
"""Least height and width in pixels that the models take."""


def example_input(channels: int, size: tuple[int, int] | None, pixels: bool) -> Tensor:
    """Return images to trace with: two different sides, so that no size is mistaken for another.

    Args:
        channels: of the images.
        size: fixed (height, width), or `None`.
        pixels: 8-bit pixels (B, H, W, C) in place of normalised images (B, C, H, W).
    """
    height, width = size or (224, 192)
    if pixels:
        return torch.randint(0, 256, (2, height, width, channels), dtype=torch.uint8)
    return torch.randn(2, channels, height, width)


def trace(network: nn.Module, images: Tensor, *, fixed: bool, fixed_batch: bool = False) -> ExportedProgram:
    """Return the network as a program in which every scan is one node.

    Args:
        network: in evaluation mode.
        images: from `example_input`.
        fixed: keep the height and width of the images; else they are free.
        fixed_batch: keep the number of images as well; else it is free.

    Raises:
        LightspineError: PyTorch cannot trace the network.
    """
    sides = (1, 2) if images.dtype == torch.uint8 else (2, 3)
    axes = (*(() if fixed_batch else (0,)), *(() if fixed else sides))
    free: dict[int, Any] = dict.fromkeys(axes, Dim.DYNAMIC)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The exporter warns of its own workings.
            warnings.simplefilter("ignore")
            return torch.export.export(network, (images,), dynamic_shapes=(free,))
    except Exception as error:
        raise LightspineError(
            f"PyTorch cannot export this {type(network).__name__}: {type(error).__name__}: {error}"
        ) from error


def check_size(size: tuple[int, int] | None) -> None:
    """Refuse a fixed size that no model takes.

    Raises:
        UsageError: a side below 32 pixels.
    """
    if size is not None and min(size) < MIN_SIDE:
        raise UsageError(
            f"expected a fixed size of at least {MIN_SIDE}x{MIN_SIDE} px, got {size[0]}x{size[1]}"
        )
