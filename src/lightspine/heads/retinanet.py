"""RetinaNet as published: labels from 1, losses averaged over the objects of the whole batch."""

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models import detection
from torchvision.ops import box_iou, sigmoid_focal_loss

from lightspine.heads.detection_transform import DetectionTransform, Target
from lightspine.heads.rpn import Float32RetinaNetHead, MinOverlapMatcher, StridedAnchors


class RetinaNet(detection.RetinaNet):
    """torchvision's RetinaNet (Lin et al., arXiv:1708.02002) with the settings of the published detectors.

    Anchors of 4 strides times three scales per octave and three ratios, four convolutions for classes and
    four for boxes, focal loss (gamma 2, alpha 0.25) and L1 loss, matching above 0.5 and below 0.4. Both
    losses are divided by the number of matched anchors of the batch. No output stands for the background.

    Args:
        backbone: gives an ordered dict of maps of the width `out_channels`.
        strides: strides of the maps.
        num_classes: classes of objects; the labels of targets and predictions are 1 to `num_classes`.
        inputs: what is done with images and targets.
        score_threshold: least score of a prediction.
        detections_per_image: most predictions of an image.
        anchor_scale: factor of the anchors' sides.
    """

    def __init__(
        self,
        backbone: nn.Module,
        strides: tuple[int, ...],
        num_classes: int,
        inputs: DetectionTransform,
        *,
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
        anchor_scale: float = 1.0,
    ):
        anchors = StridedAnchors(strides, scales=[4 * anchor_scale * 2 ** (i / 3) for i in range(3)])
        width: int = backbone.out_channels  # type: ignore[assignment]
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=anchors,
            head=Float32RetinaNetHead(width, anchors.num_anchors_per_location()[0], num_classes),
            proposal_matcher=MinOverlapMatcher(0.5, 0.4, least=0.0),
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections_per_image,
        )
        self.transform = inputs

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Target]:
        """Return the losses in training, else the predictions; see `build_detector`.

        Raises:
            UsageError: images or targets that do not fit (`DetectionTransform.check`).
        """
        self.transform.check(images, targets)
        result: dict[str, Tensor] | list[Target] = super().forward(images, targets)
        return result

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses "classification" and "bbox_regression" of the batch."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        class_loss, box_loss = logits.new_zeros(()), deltas.new_zeros(())
        matched = 0
        for i, target in enumerate(targets):
            match = self._match(target, anchors[i])
            positive = torch.where(match >= 0)[0]
            objects = match[positive]
            matched += len(positive)
            wanted = torch.zeros_like(logits[i])
            wanted[positive, target["labels"][objects] - 1] = 1.0
            # Anchors between the two thresholds are neither background nor object.
            valid = match != self.proposal_matcher.BETWEEN_THRESHOLDS
            class_loss = class_loss + sigmoid_focal_loss(logits[i][valid], wanted[valid], reduction="sum")
            boxes = target["boxes"][objects].to(anchors[i].dtype)
            wanted_deltas = self.box_coder.encode_single(boxes, anchors[i][positive])
            box_loss = box_loss + (deltas[i][positive] - wanted_deltas).abs().sum()
        objects_or_one = max(matched, 1)
        return {"classification": class_loss / objects_or_one, "bbox_regression": box_loss / objects_or_one}

    def _match(self, target: Target, anchors: Tensor) -> Tensor:
        """Return for each anchor the index of its object, or a negative number."""
        if not len(target["boxes"]):
            return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        overlaps = box_iou(target["boxes"], anchors)
        match: Tensor = self.proposal_matcher(overlaps)
        return match

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[Target]:
        """Return boxes, scores and labels of each image."""
        detections: list[Target] = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [found | {"labels": found["labels"] + 1} for found in detections]
