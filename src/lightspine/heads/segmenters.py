"""Semantic segmentation networks on any backbone: UPerNet, Semantic FPN and the auxiliary FCN head."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import Conv2dNormActivation

from lightspine.errors import UsageError
from lightspine.heads.features import FeatureBackbone
from lightspine.heads.fpn import FeaturePyramid
from lightspine.heads.simple_fpn import RescaledMaps


def _conv(in_channels: int, channels: int, kernel_size: int = 3) -> Conv2dNormActivation:
    """Convolution without bias, BatchNorm, ReLU."""
    return Conv2dNormActivation(in_channels, channels, kernel_size)


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _init_decoder(module: nn.Module, classifier: nn.Conv2d) -> None:
    """Initialize as published: Kaiming for convolutions, normal with std 0.01 for the classifier."""
    for layer in module.modules():
        if isinstance(layer, Conv2dNormActivation):
            nn.init.kaiming_normal_(layer[0].weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)


class PyramidPooling(nn.Module):
    """Pyramid pooling module of PSPNet (Zhao et al., arXiv:1612.01105).

    Args:
        in_channels: input channels.
        channels: output channels.
        scales: output sizes of the adaptive average pooling.

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
            UsageError: training with a single image per process and BatchNorm that is not synchronized.
        """
        # At scale 1 a channel of a single image has one value, and BatchNorm no variance.
        unsynchronized = any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.convs.modules())
        if unsynchronized and len(x) == 1 and 1 in self.scales:
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
    """UPerNet decoder (Xiao et al., arXiv:1807.10221): pyramid pooling, FPN and fusion of all levels.

    Args:
        in_channels: channels of each map, finest first; any strides.
        num_classes: number of classes.
        channels: channels of all levels.
        pool_scales: see `PyramidPooling`.
        dropout: channel dropout rate before the classifier.

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
        _init_decoder(self, self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the logits of the backbone's maps."""
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
    """Semantic FPN decoder (Kirillov et al., arXiv:1901.02446): upsampled and summed FPN levels.

    Args:
        in_channels: channels of each map, finest first.
        in_strides: strides of the maps, each twice the previous one.
        num_classes: number of classes.
        pyramid_channels: channels of the FPN.
        channels: channels of the summed levels.
        levels: number of FPN levels; missing ones take every second pixel of the previous level.
        dropout: channel dropout rate before the classifier.

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
        _init_decoder(self, self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the logits of the backbone's maps."""
        levels = list(self.pyramid(maps).values())
        size = levels[0].shape[2:]
        summed = self.scales[0](levels[0])
        for scale, level in zip(self.scales[1:], levels[1:], strict=True):
            # Upsampling by 2 overshoots if a map size was rounded up.
            summed = summed + _resize(scale(level), size)
        logits: Tensor = self.classifier(self.drop(summed))
        return logits


class FCNDecoder(nn.Module):
    """FCN head: a convolution and a classifier on one map; UPerNet's auxiliary head in training.

    Args:
        in_channels: input channels.
        num_classes: number of classes.
        channels: channels of the convolution.
        dropout: channel dropout rate before the classifier.

    Shape:
        `(B, in_channels, H, W)` to logits `(B, num_classes, H, W)`.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.conv = _conv(in_channels, channels)
        self.drop = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        _init_decoder(self, self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of one map."""
        logits: Tensor = self.classifier(self.drop(self.conv(x)))
        return logits


SegmenterName = Literal["semantic_fpn", "upernet"]

_PLAIN_STRIDES = (4, 8, 16, 32)


class Segmenter(nn.Module):
    """Semantic segmentation network: backbone, decoder and, in training, an auxiliary decoder.

    Args:
        backbone: returns the maps.
        rescale: rescales the maps of a plain backbone; `None` keeps them.
        decoder: maps to logits of any size.
        auxiliary: logits from the second to last map; `None` for no auxiliary head.
        auxiliary_weight: weight of the auxiliary loss.
        size_divisor: pad images on the right and bottom to multiples of it, and crop the logits.
        ignore_index: label of ignored pixels.

    Shape:
        Images `(B, C, H, W)` of any size, normalized as for the backbone's classifier, to logits
        `(B, num_classes, H, W)`.
    """

    def __init__(
        self,
        backbone: FeatureBackbone,
        rescale: RescaledMaps | None,
        decoder: nn.Module,
        auxiliary: FCNDecoder | None,
        *,
        auxiliary_weight: float = 0.4,
        size_divisor: int = 1,
        ignore_index: int = 255,
    ):
        super().__init__()
        self.backbone = backbone
        self.rescale = rescale
        self.decoder = decoder
        self.auxiliary = auxiliary
        self.auxiliary_weight = auxiliary_weight
        self.size_divisor = size_divisor
        self.ignore_index = ignore_index

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return the logits, or the losses if labels are given.

        Args:
            images: (B, C, H, W).
            labels: classes (B, H, W), int64.

        Returns:
            The logits (B, num_classes, H, W), or the losses to sum: "loss_segmentation" and, in training mode
            with an auxiliary decoder, the weighted "loss_auxiliary". Both are summed over the labeled pixels
            and divided by the number of all pixels, as published.

        Raises:
            UsageError: labels of a wrong shape or dtype.
        """
        size = images.shape[2:]
        if labels is not None and (labels.shape != (len(images), *size) or labels.dtype != torch.int64):
            raise UsageError(
                f"labels must be int64 of shape {(len(images), *size)}, "
                f"got {tuple(labels.shape)} of {labels.dtype}"
            )
        maps = self._maps(images)
        logits = self._upsample_logits(self.decoder(maps), size)
        if labels is None:
            return logits
        losses = {"loss_segmentation": self._loss(logits, labels)}
        if self.training and self.auxiliary is not None:
            auxiliary_logits = self._upsample_logits(self.auxiliary(maps[-2]), size)
            losses["loss_auxiliary"] = self.auxiliary_weight * self._loss(auxiliary_logits, labels)
        return losses

    def _maps(self, images: Tensor) -> list[Tensor]:
        bottom, right = ((-side) % self.size_divisor for side in images.shape[2:])
        maps: list[Tensor] = self.backbone(F.pad(images, (0, right, 0, bottom)))
        if self.rescale is None:
            return maps
        if len(maps) == 1:
            maps = maps * len(self.rescale.strides)
        return self.rescale(maps)

    def _upsample_logits(self, logits: Tensor, size: torch.Size) -> Tensor:
        height, width = (side + (-side) % self.size_divisor for side in size)
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return logits[..., : size[0], : size[1]]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        return total / labels.numel()


def build_segmenter(
    name: SegmenterName,
    backbone: FeatureBackbone,
    num_classes: int,
    *,
    channels: int | None = None,
    dropout: float = 0.1,
    auxiliary_weight: float = 0.4,
    ignore_index: int = 255,
) -> Segmenter:
    """Build a segmenter with the published settings.

    - "semantic_fpn": FPN with 256 channels and four levels, summed with 128 channels. With three maps
      (EfficientViM, SHViT) the fourth level takes every second pixel of the last one.
    - "upernet": pyramid pooling with 1, 2, 3 and 6 bins and 512 channels (published: 192 for Vim-Ti, 384 for
      Vim-S), with an auxiliary FCN head of 256 channels on the second to last map in training.

    The maps of a plain backbone (Vim, ViTs) are rescaled to strides 4, 8, 16 and 32, four maps to one stride
    each or a single one to all four, and images are padded to whole patches. All norms are BatchNorm2d:
    convert them with `torch.nn.SyncBatchNorm.convert_sync_batchnorm` for distributed training, as published.

    Args:
        name: segmenter name.
        backbone: returns the maps.
        num_classes: number of classes.
        channels: decoder channels; default: as published.
        dropout: channel dropout rate before the classifiers.
        auxiliary_weight: weight of UPerNet's auxiliary loss; 0 removes the auxiliary head.
        ignore_index: label of ignored pixels.

    Raises:
        UsageError: an unknown name, no class, a negative auxiliary weight, a plain backbone with neither one
            nor four maps, or strides that the FPN does not support.

    Examples:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1", features_only=True)
        >>> segmenter = build_segmenter("upernet", FeatureBackbone(model), num_classes=150).eval()
        >>> segmenter(torch.zeros(1, 3, 97, 161)).shape
        torch.Size([1, 150, 97, 161])
    """
    if name not in get_args(SegmenterName):
        raise UsageError(f"the segmenter must be one of {', '.join(get_args(SegmenterName))}, got {name!r}")
    if num_classes < 1 or auxiliary_weight < 0:
        raise UsageError(
            "num_classes must be 1 or more and auxiliary_weight 0 or more, "
            f"got {num_classes} and {auxiliary_weight}"
        )
    rescale, widths, strides = _plan_maps(backbone)
    auxiliary = None
    decoder: nn.Module
    if name == "upernet":
        decoder = UPerDecoder(widths, num_classes, channels=channels or 512, dropout=dropout)
        if auxiliary_weight:
            auxiliary = FCNDecoder(widths[-2], num_classes, dropout=dropout)
    else:
        decoder = SemanticFPNDecoder(widths, strides, num_classes, channels=channels or 128, dropout=dropout)
    return Segmenter(
        backbone,
        rescale,
        decoder,
        auxiliary,
        auxiliary_weight=auxiliary_weight,
        size_divisor=backbone.strides[0] if rescale else 1,
        ignore_index=ignore_index,
    )


def _plan_maps(backbone: FeatureBackbone) -> tuple[RescaledMaps | None, list[int], list[int]]:
    """Return the rescaling module of a plain backbone, and the decoder's input channels and strides."""
    if not backbone.is_plain:
        used = [i for i, stride in enumerate(backbone.strides) if stride >= 4]
        if len(used) < 2:
            raise UsageError(
                f"a segmenter needs two maps or more of stride 4 or more, got strides {backbone.strides}"
            )
        backbone.keep_maps(used)
        return None, list(backbone.channels), list(backbone.strides)
    count = len(backbone.strides)
    if count not in (1, len(_PLAIN_STRIDES)):
        raise UsageError(
            f"a segmenter takes one map or four of a plain backbone, got {count}: "
            f"set out_indices when creating the model"
        )
    width = backbone.channels[0]
    rescale = RescaledMaps(width, backbone.strides[0], strides=_PLAIN_STRIDES)
    return rescale, [width] * len(_PLAIN_STRIDES), list(_PLAIN_STRIDES)
