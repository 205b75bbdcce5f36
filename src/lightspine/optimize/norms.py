"""Norms over the channels that add to the residual stream and convert in the same pass."""

from typing import Any

import torch.nn as nn
from torch import Tensor

from lightspine.ops.add_norm import add_norm
from lightspine.optimize import target


class FusedNorm(nn.Module):
    """Layer norm or RMS norm over the last axis, in the dtype of its weight.

    Args:
        norm: `nn.LayerNorm` or `nn.RMSNorm` of one axis, with a weight.
    """

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm):
        super().__init__()
        source: Any = norm
        self.weight, self.bias = source.weight, getattr(source, "bias", None)
        self.eps: float = source.eps
        self.rms = isinstance(norm, nn.RMSNorm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to its norm."""
        return add_norm(x, None, self.weight, self.bias, self.eps, rms=self.rms)[1]

    def add(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x + update` and its norm."""
        return add_norm(x, update, self.weight, self.bias, self.eps, rms=self.rms)


def can_fuse_norm(norm: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.LayerNorm,)) -> bool:
    """Return whether `FusedNorm` stands for a norm on a CUDA device.

    Args:
        norm: any module.
        kinds: exact types of norms over the last axis; a subclass may normalize another one.
    """
    if type(norm) not in kinds:
        return False
    known: Any = norm
    return known.weight is not None and len(known.normalized_shape) == 1 and target.on_cuda(known.weight)
