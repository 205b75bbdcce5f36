"""Detectors as functions of one image, for counting multiply-adds on the meta device."""

import torch.nn as nn
from torch import Tensor

from lightspine.heads.mask_rcnn import MaskRCNN
from lightspine.heads.retinanet import RetinaNet


class CountedDetector(nn.Module):
    """All convolutions and matrix products of a detector for one image and a fixed number of boxes.

    Convention of the published numbers: no resizing or padding of the image, 1000 proposals in the box heads,
    100 boxes in the mask head; pooling, sorting and suppression count nothing.

    Args:
        detector: from `build_detector`.
        proposals: boxes per box head.
        masks: boxes in the mask head.
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
