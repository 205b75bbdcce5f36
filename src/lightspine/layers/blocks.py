"""Building blocks that several model families share."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.layers.checkpointing import checkpoint_module


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm and optionally ReLU, padded so that stride 1 keeps the size.

    Args:
        in_dim: input channels.
        out_dim: output channels.
        kernel_size: odd kernel size.
        stride: stride.
        groups: groups of the convolution.
        act: append a ReLU.
        norm_init: initial weight of the BatchNorm; 0 makes a residual branch that ends here start at zero.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool = False,
        norm_init: float = 1.0,
    ):
        conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(out_dim)
        nn.init.constant_(norm.weight, norm_init)
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=norm)
        if act:
            layers["act"] = nn.ReLU(inplace=True)
        super().__init__(layers)


class Stage(nn.Module):
    """Stage of a hierarchical backbone: optional downsampling, then blocks.

    Args:
        downsample: downsampling layer, `nn.Identity()` for none.
        blocks: blocks that keep the size of the map.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the output of the last block."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            for block in self.blocks:
                x = checkpoint_module(block, x)
            return x
        return self.blocks(x)


@torch.no_grad()
def init_dt_bias(bias: Tensor) -> None:
    """Initialize the bias of dt as in Mamba: softplus(bias) is log-uniform between 0.001 and 0.1."""
    dt = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
    # Inverse of softplus.
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
