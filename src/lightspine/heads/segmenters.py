"""Semantic segmentation over any backbone: Semantic FPN and UPerNet with the published settings."""

from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.heads.decoders import FCNDecoder, SemanticFPNDecoder, UPerDecoder
from lightspine.heads.features import FeatureBackbone
from lightspine.heads.simple_fpn import RescaledMaps

SegmenterName = Literal["semantic_fpn", "upernet"]

_PLAIN_STRIDES = (4, 8, 16, 32)


class Segmenter(nn.Module):
    """A backbone, a decoder, and in training an auxiliary decoder over one of the maps.

    Args:
        backbone: gives the maps.
        rescale: brings them to other strides first; `None` leaves them.
        decoder: maps the maps to logits of any size.
        auxiliary: maps the last map but one to logits; `None` for none.
        auxiliary_weight: of its loss.
        size_divisor: pad images to multiples of it, at the right and the bottom, and cut the logits again.
        ignore_index: label of pixels that have none.

    Shape:
        Images `(B, C, H, W)` of any size, normalised as the backbone's classifier takes them.
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
        """Predict, or compute the losses where labels are given.

        Args:
            images: (B, C, H, W).
            labels: classes (B, H, W), int64, `ignore_index` where there is none.

        Returns:
            Without labels the logits (B, num_classes, H, W); with labels the losses to sum:
            "loss_segmentation" and, in training mode with an auxiliary decoder, "loss_auxiliary", weighted.
            Both are sums over the labelled pixels divided by the number of all pixels, as published.

        Raises:
            UsageError: labels of another size or kind.
        """
        size = images.shape[2:]
        if labels is not None and (labels.shape != (len(images), *size) or labels.dtype != torch.int64):
            raise UsageError(
                f"labels must be int64 of shape {(len(images), *size)}, "
                f"got {tuple(labels.shape)} of {labels.dtype}"
            )
        maps = self._maps(images)
        logits = self._to_pixels(self.decoder(maps), size)
        if labels is None:
            return logits
        losses = {"loss_segmentation": self._loss(logits, labels)}
        if self.training and self.auxiliary is not None:
            helped = self._to_pixels(self.auxiliary(maps[-2]), size)
            losses["loss_auxiliary"] = self.auxiliary_weight * self._loss(helped, labels)
        return losses

    def _maps(self, images: Tensor) -> list[Tensor]:
        bottom, right = ((-side) % self.size_divisor for side in images.shape[2:])
        maps: list[Tensor] = self.backbone(F.pad(images, (0, right, 0, bottom)))
        if self.rescale is None:
            return maps
        if len(maps) == 1:
            maps = maps * len(self.rescale.strides)
        return self.rescale(maps)

    def _to_pixels(self, logits: Tensor, size: torch.Size) -> Tensor:
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

    - "semantic_fpn": an FPN of 256 channels and four levels, 128 channels summed. Three maps (EfficientViM,
      SHViT) get a fourth level by taking every second pixel of the last.
    - "upernet": pyramid pooling over 1, 2, 3 and 6 cells and 512 channels (192 in Vim-Ti's, 384 in Vim-S's
      published configuration), with an auxiliary FCN of 256 channels over the last map but one in training.

    A plain backbone's maps (Vim, ViTs) are first brought to the strides 4, 8, 16 and 32, either four maps one
    each or a single one to all four; images are padded to whole patches. All norms are BatchNorm2d: convert
    them for several processes (`torch.nn.SyncBatchNorm.convert_sync_batchnorm`), as published.

    Args:
        name: the segmenter.
        backbone: the maps.
        num_classes: classes.
        channels: width of the decoder; `None` is the published one.
        dropout: share of channels dropped before the classifiers.
        auxiliary_weight: weight of UPerNet's auxiliary loss; 0 leaves the auxiliary head out.
        ignore_index: label of pixels that have none.

    Raises:
        UsageError: an unknown name, no class, an auxiliary weight below 0, a plain backbone with neither one
            nor four maps, strides that the FPN cannot join.

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
    """Return how to rescale the maps, if at all, and the widths and strides that the decoder then reads."""
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
            f"choose them with out_indices when the model is created"
        )
    width = backbone.channels[0]
    rescale = RescaledMaps(width, backbone.strides[0], strides=_PLAIN_STRIDES)
    return rescale, [width] * len(_PLAIN_STRIDES), list(_PLAIN_STRIDES)
