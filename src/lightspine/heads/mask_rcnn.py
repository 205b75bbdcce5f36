"""Mask R-CNN and Cascade Mask R-CNN: torchvision's two-stage detector with the published heads."""

import torch.nn as nn
from timm.layers import LayerNorm2d
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from lightspine.heads.detection_transform import Target
from lightspine.heads.roi_heads import CASCADE, CascadeRoIHeads, RoIPooler, Stage


class MaskRCNN(GeneralizedRCNN):
    """Proposals, then box and mask heads, in one stage or in several; see `build_detector`."""

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Target]:
        """Return the losses in training, else the predictions.

        Raises:
            UsageError: images or targets that do not fit (`DetectionTransform.check`).
        """
        self.transform.check(images, targets)
        result: dict[str, Tensor] | list[Target] = super().forward(images, targets)
        return result


class _BoxPredictor(nn.Module):
    """Class logits, background first, and box offsets, for all classes together or for each."""

    def __init__(self, in_features: int, num_classes: int, class_agnostic: bool):
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 if class_agnostic else 4 * (num_classes + 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map vectors (N, C) to logits and offsets."""
        return self.cls_score(x), self.bbox_pred(x)


def build_roi_heads(
    channels: int,
    strides: tuple[int, ...],
    num_classes: int,
    cascade: bool,
    score_threshold: float,
    detections_per_image: int,
) -> CascadeRoIHeads:
    """Build the box and mask heads of Mask R-CNN, or those of ViTDet's Cascade Mask R-CNN.

    Args:
        channels: width of the pyramid.
        strides: strides of the levels that boxes are cropped from.
        num_classes: classes of objects.
        cascade: three stages that move boxes of all classes alike, LayerNorm in the heads; else one stage.
        score_threshold: least score of a prediction.
        detections_per_image: most predictions of an image.
    """
    stages = CASCADE if cascade else (Stage(),)
    box_heads = [_build_box_head(channels, cascade) for _ in stages]
    mask_head = MaskRCNNHeads(channels, [256] * 4, dilation=1, norm_layer=LayerNorm2d if cascade else None)
    mask_predictor = MaskRCNNPredictor(256, 256, num_classes + 1)
    for module in mask_predictor.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if cascade:
        nn.init.normal_(mask_predictor.mask_fcn_logits.weight, std=0.001)
    return CascadeRoIHeads(
        RoIPooler(strides, 7),
        box_heads,
        [_BoxPredictor(1024, num_classes, class_agnostic=cascade) for _ in stages],
        stages,
        RoIPooler(strides, 14),
        mask_head,
        mask_predictor,
        score_threshold=score_threshold,
        detections_per_image=detections_per_image,
    )


def _build_box_head(channels: int, cascade: bool) -> nn.Module:
    head: nn.Module
    if cascade:
        head = FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [1024], norm_layer=LayerNorm2d)
    else:
        head = TwoMLPHead(channels * 7 * 7, 1024)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return head
