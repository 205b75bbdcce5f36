"""Simple feature pyramid (ViTDet) and rescaled maps (UPerNet) for plain, single-stride backbones."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor

from lightspine.errors import UsageError

NormLayer = Callable[[int], nn.Module]


def _doublings(from_stride: int, to_stride: int) -> int:
    """Return how often the map size doubles (negative: halves) from one stride to another."""
    power = math.log2(from_stride / to_stride)
    if not power.is_integer():
        raise UsageError(
            f"a map of stride {from_stride} cannot be resized to stride {to_stride} by doubling or halving"
        )
    return int(power)


def _halve(times: int) -> nn.Module:
    # ceil_mode keeps a map of one pixel; it changes nothing at the published sizes.
    return nn.MaxPool2d(2**times, 2**times, ceil_mode=True)


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid (Li et al., arXiv:2203.16527): all levels from the last map.

    Finer levels start with transposed 2x2 convolutions that halve the channels, with LayerNorm and GELU in
    between; coarser ones with max pooling. Each level ends with a 1x1 and a 3x3 convolution, each followed by
    LayerNorm.

    Args:
        in_channels: channels of the map.
        in_stride: stride of the map.
        strides: strides of the levels, finest first.
        channels: channels of the levels.
        coarser: number of additional levels, each every second pixel of the previous one.

    Shape:
        A list with one map `(B, in_channels, H, W)` to an ordered dict, stride (as a string) ->
        `(B, channels, ...)`, finest first.

    Raises:
        UsageError: a stride that is not `in_stride` times a power of two.
    """

    def __init__(
        self,
        in_channels: int,
        in_stride: int = 16,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        channels: int = 256,
        coarser: int = 1,
    ):
        super().__init__()
        self.channels = channels
        self.coarser = coarser
        self.strides = (*strides, *(strides[-1] * 2**i for i in range(1, coarser + 1)))
        self.levels = nn.ModuleList(
            self._make_level(in_channels, _doublings(in_stride, stride)) for stride in strides
        )

    def _make_level(self, width: int, doublings: int) -> nn.Sequential:
        layers: list[nn.Module] = [_halve(-doublings)] if doublings < 0 else []
        for i in range(doublings):
            if i:
                layers += [LayerNorm2d(width), nn.GELU()]
            layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
            width //= 2
        layers += [
            nn.Conv2d(width, self.channels, 1, bias=False),
            LayerNorm2d(self.channels),
            nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False),
            LayerNorm2d(self.channels),
        ]
        return nn.Sequential(*layers)

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Return the levels by stride."""
        levels = [level(maps[0]) for level in self.levels]
        for _ in range(self.coarser):
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return OrderedDict((str(stride), level) for stride, level in zip(self.strides, levels, strict=True))


class RescaledMaps(nn.Module):
    """Rescale maps of one stride to a stride each, as in UPerNet over Vim and BEiT.

    Finer maps are upsampled by transposed 2x2 convolutions with norm and GELU in between, coarser ones
    max-pooled, and one with stride `in_stride` is unchanged.

    Args:
        channels: channels of the maps.
        in_stride: stride of the maps.
        strides: output stride of each map.
        norm_layer: creates a norm layer from a number of channels.

    Shape:
        Maps `(B, channels, H, W)` to maps `(B, channels, H * in_stride / stride, ...)`.

    Raises:
        UsageError: a stride that is not `in_stride` times a power of two.
    """

    def __init__(
        self,
        channels: int,
        in_stride: int = 16,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        norm_layer: NormLayer = nn.BatchNorm2d,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.scales = nn.ModuleList()
        for stride in strides:
            doublings = _doublings(in_stride, stride)
            layers: list[nn.Module] = [_halve(-doublings)] if doublings < 0 else []
            for i in range(doublings):
                if i:
                    layers += [norm_layer(channels), nn.GELU()]
                layers.append(nn.ConvTranspose2d(channels, channels, 2, 2))
            self.scales.append(nn.Sequential(*layers))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Rescale each map."""
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]
