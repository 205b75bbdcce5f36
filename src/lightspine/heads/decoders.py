"""What turns a backbone's maps into class maps: UPerNet, Semantic FPN and the FCN that helps in training."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import Conv2dNormActivation

from lightspine.errors import UsageError
from lightspine.heads.fpn import FeaturePyramid


def _conv(in_channels: int, channels: int, kernel_size: int = 3) -> Conv2dNormActivation:
    """Return a convolution without bias, BatchNorm and ReLU."""
    return Conv2dNormActivation(in_channels, channels, kernel_size)


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _init(module: nn.Module, classifier: nn.Conv2d) -> None:
    """Initialise as the published decoders are: Kaiming, and a classifier that starts near zero."""
    for layer in module.modules():
        if isinstance(layer, Conv2dNormActivation):
            nn.init.kaiming_normal_(layer[0].weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)


class PyramidPooling(nn.Module):
    """PSPNet's pooling (Zhao et al., arXiv:1612.01105): means over grids of several sizes beside the map.

    Args:
        in_channels: width of the map.
        channels: width of the result.
        scales: sides of the grids.

    Shape:
        `(B, in_channels, H, W)` to `(B, channels, H, W)`.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        self.scales = tuple(scales)
        self.convs = nn.ModuleList(_conv(in_channels, channels, 1) for _ in scales)
        self.bottleneck = _conv(in_channels + len(self.scales) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pool the map.

        Raises:
            UsageError: training with a single image and a BatchNorm of this process alone.
        """
        lonely = any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.convs.modules())
        if lonely and len(x) == 1 and 1 in self.scales:
            raise UsageError(
                "UPerNet's BatchNorm needs 2 images or more per process in training, got 1 "
                "(or convert the norms to SyncBatchNorm)"
            )
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(x, scale)), x.shape[2:])
            for conv, scale in zip(self.convs, self.scales, strict=True)
        ]
        out: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return out


class UPerDecoder(nn.Module):
    """UPerNet's decoder (Xiao et al., arXiv:1807.10221): pyramid pooling, an FPN, all levels fused.

    Args:
        in_channels: width of each map, the finest first; their strides may be any.
        num_classes: classes.
        channels: width of all levels.
        pool_scales: sides of the grids of the pyramid pooling.
        dropout: share of channels dropped before the classifier.

    Shape:
        Maps `(B, C_i, H_i, W_i)` to logits `(B, num_classes, H_0, W_0)`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        *finer, last = in_channels
        self.pooling = PyramidPooling(last, channels, pool_scales)
        self.laterals = nn.ModuleList(_conv(width, channels, 1) for width in finer)
        self.smooths = nn.ModuleList(_conv(channels, channels) for _ in finer)
        self.bottleneck = _conv(len(in_channels) * channels, channels)
        self.drop = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        _init(self, self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map the backbone's maps to logits."""
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps[:-1], strict=True)]
        merged.append(self.pooling(maps[-1]))
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + _resize(merged[i + 1], merged[i].shape[2:])
        levels = [smooth(x) for smooth, x in zip(self.smooths, merged[:-1], strict=True)]
        levels.append(merged[-1])
        size = levels[0].shape[2:]
        fused = self.bottleneck(torch.cat([_resize(level, size) for level in levels], dim=1))
        logits: Tensor = self.classifier(self.drop(fused))
        return logits


class SemanticFPNDecoder(nn.Module):
    """Semantic FPN (Kirillov et al., arXiv:1901.02446): an FPN, its levels brought to the finest and summed.

    Args:
        in_channels: width of each map, the finest first.
        in_strides: their strides, each twice the one before.
        num_classes: classes.
        pyramid_channels: width of the FPN.
        channels: width of what is summed.
        levels: levels of the FPN; those that the maps lack are every second pixel of the one before.
        dropout: share of channels dropped before the classifier.

    Shape:
        Maps `(B, C_i, H_i, W_i)` to logits `(B, num_classes, H_0, W_0)`.

    Raises:
        UsageError: strides that do not double.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        num_classes: int,
        *,
        pyramid_channels: int = 256,
        channels: int = 128,
        levels: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.pyramid = FeaturePyramid(
            in_channels, in_strides, channels=pyramid_channels, coarser=max(levels - len(in_channels), 0)
        )
        finest = self.pyramid.strides[0]
        self.scales = nn.ModuleList()
        for stride in self.pyramid.strides:
            layers: list[nn.Module] = []
            doublings = round(math.log2(stride / finest))
            for i in range(max(doublings, 1)):
                layers.append(_conv(channels if i else pyramid_channels, channels))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scales.append(nn.Sequential(*layers))
        self.drop = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        _init(self, self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map the backbone's maps to logits."""
        levels = list(self.pyramid(maps).values())
        size = levels[0].shape[2:]
        summed = self.scales[0](levels[0])
        for scale, level in zip(self.scales[1:], levels[1:], strict=True):
            # Doubling overshoots where a map's size was rounded up.
            summed = summed + _resize(scale(level), size)
        logits: Tensor = self.classifier(self.drop(summed))
        return logits


class FCNDecoder(nn.Module):
    """One convolution and a classifier over one map: the auxiliary head of UPerNet's training.

    Args:
        in_channels: width of the map.
        num_classes: classes.
        channels: width of the convolution.
        dropout: share of channels dropped before the classifier.

    Shape:
        `(B, in_channels, H, W)` to logits `(B, num_classes, H, W)`.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.conv = _conv(in_channels, channels)
        self.drop = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        _init(self, self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Map one map to logits."""
        logits: Tensor = self.classifier(self.drop(self.conv(x)))
        return logits
