"""RetinaNet with the published settings: labels from 1, losses divided by the positives of the batch."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, sigmoid_focal_loss

from lightspine.heads.boxes import (
    ClampedBoxCoder,
    ImageSize,
    batched_nms,
    best_indices,
    clip_boxes,
    nonempty_boxes,
)
from lightspine.heads.detection_transform import DetectionTransform, Target
from lightspine.heads.rpn import MinOverlapMatcher, StridedAnchors, at_least_float32


class Float32RetinaNetHead(RetinaNetHead):
    """torchvision's RetinaNet head with float32 outputs under autocast."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Return class logits (B, N, classes) and box offsets (B, N, 4)."""
        return {name: at_least_float32(y) for name, y in super().forward(x).items()}


class RetinaNet(detection.RetinaNet):
    """torchvision's RetinaNet (Lin et al., arXiv:1708.02002) with the settings of the published detectors.

    Anchor sizes of 4 strides times three scales per octave, three aspect ratios, four convolutions each for
    classes and boxes, focal loss (gamma 2, alpha 0.25) and L1 loss, positive from IoU 0.5, background below
    0.4. Both losses are divided by the number of positive anchors of the batch. There is no background class.

    Args:
        backbone: returns an ordered dict of maps with `out_channels` channels.
        strides: stride of each map.
        num_classes: object classes; labels of targets and predictions are 1 to `num_classes`.
        transform: input transform.
        score_threshold: minimum score of a prediction.
        detections_per_image: maximum number of predictions per image.
        anchor_scale: factor of the anchor sizes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        strides: tuple[int, ...],
        num_classes: int,
        transform: DetectionTransform,
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
            proposal_matcher=MinOverlapMatcher(0.5, 0.4, min_overlap=0.0),
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections_per_image,
        )
        self.transform = transform
        self.box_coder = ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Target]:
        """Return the losses in training mode, else the predictions; see `build_detector`.

        Raises:
            UsageError: invalid images or targets, see `DetectionTransform.check`.
        """
        self.transform.check(images, targets)
        result: dict[str, Tensor] | list[Target] = super().forward(images, targets)
        return result

    def detect(self, images: Tensor, sizes: Sequence[ImageSize]) -> list[Target]:
        """Return the predictions of a normalized and padded batch, in pixels of the batch.

        `torch.export` can trace it, unlike `forward`.

        Args:
            images: (B, C, H, W), sides multiples of 32.
            sizes: height and width of each image before padding.
        """
        maps = list(cast(Any, self.backbone)(images).values())
        outputs = [self.head([level]) for level in maps]
        anchors = cast(StridedAnchors, self.anchor_generator).level_anchors(maps)
        by_name = {name: [output[name] for output in outputs] for name in outputs[0]}
        return self.postprocess_detections(by_name, [anchors for _ in sizes], sizes)

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses "classification" and "bbox_regression" of the batch."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        class_loss, box_loss = logits.new_zeros(()), deltas.new_zeros(())
        num_positives = 0
        for i, target in enumerate(targets):
            match = self._match_anchors(target, anchors[i])
            positive = torch.where(match >= 0)[0]
            objects = match[positive]
            num_positives += len(positive)
            class_targets = torch.zeros_like(logits[i])
            class_targets[positive, target["labels"][objects] - 1] = 1.0
            # Anchors between the two thresholds are neither background nor object.
            valid = match != self.proposal_matcher.BETWEEN_THRESHOLDS
            class_loss = class_loss + sigmoid_focal_loss(
                logits[i][valid], class_targets[valid], reduction="sum"
            )
            boxes = target["boxes"][objects].to(anchors[i].dtype)
            delta_targets = self.box_coder.encode_single(boxes, anchors[i][positive])
            box_loss = box_loss + (deltas[i][positive] - delta_targets).abs().sum()
        divisor = max(num_positives, 1)
        return {"classification": class_loss / divisor, "bbox_regression": box_loss / divisor}

    def _match_anchors(self, target: Target, anchors: Tensor) -> Tensor:
        """Return the index of each anchor's object, negative for none."""
        if not len(target["boxes"]):
            return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        overlaps = box_iou(target["boxes"], anchors)
        match: Tensor = self.proposal_matcher(overlaps)
        return match

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: Sequence[ImageSize],
    ) -> list[Target]:
        """Return the boxes, scores and labels (from 1) of each image, sorted by score.

        Args:
            head_outputs: class logits (B, N_l, num_classes) and box offsets (B, N_l, 4) of each level.
            anchors: anchors (N_l, 4) of each image and level.
            image_shapes: height and width of each image before padding.
        """
        levels = list(zip(head_outputs["cls_logits"], head_outputs["bbox_regression"], strict=True))
        detections = []
        for image, (image_anchors, shape) in enumerate(zip(anchors, image_shapes, strict=True)):
            candidates = [
                self._select_candidates(logits[image], offsets[image], level_anchors)
                for (logits, offsets), level_anchors in zip(levels, image_anchors, strict=True)
            ]
            scores, classes, offsets, boxes = (torch.cat(parts) for parts in zip(*candidates, strict=True))
            boxes = clip_boxes(self.box_coder.decode_single(offsets, boxes), shape)
            nonempty = torch.where(nonempty_boxes(boxes))[0]
            boxes, scores, classes = boxes[nonempty], scores[nonempty], classes[nonempty]
            kept = batched_nms(boxes, scores, classes, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": boxes[kept], "scores": scores[kept], "labels": classes[kept] + 1})
        return detections

    def _select_candidates(
        self, logits: Tensor, offsets: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the best scores of a level with their classes (from 0), offsets and anchors."""
        scores = logits.sigmoid()
        rows, classes = torch.where(scores > self.score_thresh)
        found = scores[rows, classes]
        best = best_indices(found, self.topk_candidates)
        rows = rows[best]
        return found[best], classes[best], offsets[rows], anchors[rows]
