"""Detectors as functions of one image, for counting multiply-adds on the meta device."""

import torch.nn as nn
from torch import Tensor

from lightspine.heads.mask_rcnn import MaskRCNN
from lightspine.heads.retinanet import RetinaNet


class CountedDetector(nn.Module):
    """All convolutions and matrix products of a detector for one image, at a fixed number of boxes.

    The published figures' convention: the image enters at its size, without resizing or padding; the box
    heads run on 1000 proposals, the mask head on 100; cropping, sorting and suppression count nothing.

    Args:
        detector: what `build_detector` returns.
        proposals: boxes that each box head sees.
        masks: boxes that the mask head sees.

    Examples:
        >>> import lightspine, torch
        >>> from lightspine.benchmark.macs import count_macs
        >>> from lightspine.heads import FeatureBackbone, build_detector
        >>> with torch.device("meta"):
        ...     model = lightspine.create_model("vmamba_tiny", features_only=True)
        ...     detector = build_detector("mask_rcnn", FeatureBackbone(model, norm="layer"), num_classes=80)
        >>> round(count_macs(CountedDetector(detector), (3, 1280, 800)).total / 1e9)
        271
    """

    def __init__(self, detector: RetinaNet | MaskRCNN, *, proposals: int = 1000, masks: int = 100):
        super().__init__()
        self.detector = detector
        self.proposals = proposals
        self.masks = masks

    def forward(self, image: Tensor) -> list[Tensor]:
        """Run the network on one image (1, C, H, W), without targets or decoding."""
        detector = self.detector
        levels = detector.backbone(image)
        maps = list(levels.values())
        if isinstance(detector, RetinaNet):
            return list(detector.head(maps).values())
        outputs: list[Tensor] = [x for scores in detector.rpn.head(maps) for x in scores]
        heads = detector.roi_heads
        crops = maps[0].new_zeros((self.proposals, maps[0].shape[1], *heads.box_roi_pool.output_size))
        for head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
            outputs += predictor(head(crops))
        crops = maps[0].new_zeros((self.masks, maps[0].shape[1], *heads.mask_roi_pool.output_size))
        return [*outputs, heads.mask_predictor(heads.mask_head(crops))]
