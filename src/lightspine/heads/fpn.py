"""Feature pyramid network (FPN) with optional finer and coarser levels."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError

Coarser = Literal["max_pool", "conv"]


class FeaturePyramid(nn.Module):
    """Feature pyramid network (FPN, Lin et al., arXiv:1612.03144) for maps whose strides double.

    Without extra levels it is the plain FPN. A `finest_stride` below that of the first map adds finer levels
    by transposed convolutions, as in the detectors of SHViT and EfficientViM: the first one upsamples the
    merged finest lateral, each further one the previous output. Every level ends with a 3x3 convolution.

    Args:
        in_channels: channels of each map, finest first.
        in_strides: strides of the maps, each twice the previous one.
        channels: channels of all levels.
        finest_stride: stride of the first level; default: that of the first map.
        coarser: number of extra levels after the last map.
        coarser_by: "max_pool" takes every second pixel of the previous level; "conv" is a 3x3 convolution of
            stride 2, the first one applied to the last *input* map, without activations in between.

    Shape:
        Maps `(B, C_i, H_i, W_i)` to an ordered dict, stride (as a string) -> `(B, channels, H, W)`, finest
        first. The level of an input map has the size of that map.

    Raises:
        UsageError: strides that do not double, or an invalid `finest_stride` or `coarser_by`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        channels: int = 256,
        finest_stride: int | None = None,
        coarser: int = 0,
        coarser_by: Coarser = "max_pool",
    ):
        super().__init__()
        first = in_strides[0]
        if list(in_strides) != [first * 2**i for i in range(len(in_channels))]:
            raise UsageError(f"a feature pyramid needs strides that double, got {tuple(in_strides)}")
        finest = first if finest_stride is None else finest_stride
        finer = int(math.log2(first / finest)) if finest > 0 else -1
        if finer < 0 or finest * 2**finer != first:
            raise UsageError(
                f"finest_stride must be {first} or a half, a quarter... of it, got {finest_stride}"
            )
        if coarser_by not in ("max_pool", "conv"):
            raise UsageError(f"coarser_by must be 'max_pool' or 'conv', got {coarser_by!r}")
        self.channels = channels
        self.coarser = coarser
        levels = finer + len(in_channels) + coarser
        self.strides = tuple(finest * 2**i for i in range(levels))

        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.smooths = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        # From coarse to fine; one upsampling and one output convolution per level.
        self.finer_ups = nn.ModuleList(nn.ConvTranspose2d(channels, channels, 2, 2) for _ in range(finer))
        self.finer_smooths = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(finer))
        convs = coarser if coarser_by == "conv" else 0
        self.coarser_convs = nn.ModuleList(
            nn.Conv2d(in_channels[-1] if i == 0 else channels, channels, 3, 2, 1) for i in range(convs)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Return the levels by stride."""
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(merged) - 2, -1, -1):
            size = merged[i].shape[2:]
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=size, mode="nearest")
        levels = [smooth(x) for smooth, x in zip(self.smooths, merged, strict=True)]

        x = merged[0]
        for up, smooth in zip(self.finer_ups, self.finer_smooths, strict=True):
            x = up(x)
            levels.insert(0, smooth(x))

        source = maps[-1]
        for conv in self.coarser_convs:
            source = conv(source)
            levels.append(source)
        for _ in range(self.coarser - len(self.coarser_convs)):
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return OrderedDict((str(stride), level) for stride, level in zip(self.strides, levels, strict=True))
