"""Mask R-CNN and Cascade Mask R-CNN with the published heads, on top of torchvision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from lightspine.errors import UsageError
from lightspine.heads.boxes import ClampedBoxCoder, ImageSize, batched_nms, clip_boxes
from lightspine.heads.detection_transform import Target
from lightspine.heads.rpn import at_least_float32


class RoIPooler(MultiScaleRoIAlign):
    """Multi-scale RoIAlign that selects the level by box size (equation 1 of the FPN paper).

    Unlike torchvision's, which infers the strides from the first batch, it takes the strides as arguments. It
    samples as the published detectors do: pixel centers at half integers, adaptive number of samples per bin.

    Args:
        strides: strides of the levels to pool from, which are also the keys of the maps.
        output_size: height and width of the pooled features.

    Shape:
        Maps `{str(stride): (B, C, H, W)}` and boxes `(N_i, 4)` in image pixels for each image; output
        `(sum of N_i, C, output_size, output_size)`.
    """

    def __init__(self, strides: Sequence[int], output_size: int):
        super().__init__([str(stride) for stride in strides], output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[ImageSize]) -> Tensor:
        """Pool the boxes; `image_shapes` is part of torchvision's interface and unused."""
        del image_shapes
        maps = [x[name] for name in self.featmap_names]
        # `shape` may be a symbol of `torch.export`, `len` may not.
        which = torch.cat([b.new_full((b.shape[0], 1), i) for i, b in enumerate(boxes)])
        rois = torch.cat([which, torch.cat(boxes)], dim=1)
        levels = self._assign_levels(rois)
        crops = maps[0].new_zeros((rois.shape[0], maps[0].shape[1], *self.output_size))
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            cropped = roi_align(
                feature, rois[chosen], self.output_size, 1 / stride, sampling_ratio=0, aligned=True
            )
            # Under autocast roi_align may return another dtype than the maps'.
            crops[chosen] = cropped.to(crops.dtype)
        return crops

    def _assign_levels(self, rois: Tensor) -> Tensor:
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        # Boxes of 56 to 112 px are assigned to stride 4, of 112 to 224 px to stride 8, ...
        level = torch.floor(torch.log2(side / (14 * self.strides[0]) + 1e-6))
        return level.clamp(0, len(self.strides) - 1).long()


Sizes = Sequence[ImageSize]


@dataclass(frozen=True)
class Stage:
    """One stage of a cascade.

    Attributes:
        overlap: minimum IoU of a positive proposal.
        weights: box coder weights (x, y, width, height).
    """

    overlap: float = 0.5
    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)


CASCADE = (
    Stage(0.5, (10.0, 10.0, 5.0, 5.0)),
    Stage(0.6, (20.0, 20.0, 10.0, 10.0)),
    Stage(0.7, (30.0, 30.0, 15.0, 15.0)),
)


@dataclass
class Samples:
    """Proposals of a batch with the matched objects and labels; one entry per image."""

    boxes: list[Tensor]
    objects: list[Tensor]
    labels: list[Tensor]


class CascadeRoIHeads(RoIHeads):
    """Box and mask heads of Cascade Mask R-CNN (Cai and Vasconcelos, arXiv:1906.09756).

    The boxes of a stage are the proposals of the next one, which has a higher IoU threshold; only the first
    stage samples proposals. Predictions have the mean class probabilities of all stages and the boxes of the
    last one. In training the gradient of each stage into the pyramid is scaled by 1 / stages.
    The mask head is trained on the first stage's samples and predicts masks for the last stage's boxes.

    With one stage these are Mask R-CNN's heads, equal to torchvision's with `smooth_l1_beta=1/9` and
    `exact_masks=False`.

    Args:
        box_roi_pool: pools the proposals.
        box_heads: one per stage; maps pooled features to vectors.
        box_predictors: one per stage; maps vectors to class logits (N, num_classes + 1), background first,
            and offsets: class-agnostic (N, 4), or with a single stage per class (N, 4 (num_classes + 1)).
        stages: IoU threshold and box coder weights of each stage.
        mask_roi_pool: pools the boxes for the mask head.
        mask_head: maps pooled features to mask features.
        mask_predictor: maps mask features to one mask logit per class, background included.
        smooth_l1_beta: beta of the smooth L1 box loss; 0, as published, is plain L1.
        exact_masks: crop mask targets at pixel centers and round them to 0 or 1, as published; otherwise as
            torchvision does.
        score_threshold: minimum score of a prediction.
        detections_per_image: maximum number of predictions per image.

    Raises:
        UsageError: different numbers of stages, heads and predictors.
    """

    def __init__(
        self,
        box_roi_pool: MultiScaleRoIAlign,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        stages: Sequence[Stage],
        mask_roi_pool: MultiScaleRoIAlign,
        mask_head: nn.Module,
        mask_predictor: nn.Module,
        *,
        smooth_l1_beta: float = 0.0,
        exact_masks: bool = True,
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
    ):
        if not len(stages) == len(box_heads) == len(box_predictors) > 0:
            raise UsageError(
                "stages, box_heads and box_predictors must have one entry per stage, "
                f"got {len(stages)}, {len(box_heads)} and {len(box_predictors)}"
            )
        super().__init__(
            box_roi_pool,
            nn.ModuleList(box_heads),
            nn.ModuleList(box_predictors),
            fg_iou_thresh=stages[0].overlap,
            bg_iou_thresh=stages[0].overlap,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections_per_image,
            mask_roi_pool=mask_roi_pool,
            mask_head=mask_head,
            mask_predictor=mask_predictor,
        )
        self.coders = [ClampedBoxCoder(stage.weights) for stage in stages]
        self.matchers = [Matcher(stage.overlap, stage.overlap) for stage in stages]
        self.smooth_l1_beta = smooth_l1_beta
        self.exact_masks = exact_masks

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Return the predictions (empty in training mode) and the losses (empty in evaluation mode).

        Args:
            features: pyramid maps.
            proposals: boxes (N_i, 4) per image.
            image_shapes: height and width of each image before padding.
            targets: boxes, labels and masks per image, for training.

        Raises:
            UsageError: training without targets.
        """
        if not self.training:
            return self._predict(features, proposals, image_shapes), {}
        if targets is None:
            raise UsageError("training needs targets, got none")
        boxes, objects, labels, _ = self.select_training_samples(proposals, targets)
        first = samples = Samples(boxes, objects, labels)
        losses: dict[str, Tensor] = {}
        for stage in range(len(self.coders)):
            logits, offsets = self._run_stage(stage, features, samples.boxes, image_shapes)
            class_loss, box_loss = self._box_losses(stage, logits, offsets, samples, targets)
            suffix = f"_{stage}" if len(self.coders) > 1 else ""
            losses[f"loss_classifier{suffix}"] = class_loss
            losses[f"loss_box_reg{suffix}"] = box_loss
            if stage + 1 < len(self.coders):
                boxes = self._refine_boxes(stage, offsets, samples.boxes, image_shapes)
                samples = self._match_boxes(stage + 1, boxes, targets)
        losses["loss_mask"] = self._mask_loss(features, first, image_shapes, targets)
        return [], losses

    def _run_stage(
        self, stage: int, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes
    ) -> tuple[Tensor, Tensor]:
        crops = self.box_roi_pool(features, boxes, image_shapes)
        share = 1 / len(self.coders)
        if self.training and share < 1:
            crops = crops * share + crops.detach() * (1 - share)
        logits, offsets = self.box_predictor[stage](self.box_head[stage](crops))
        return at_least_float32(logits), at_least_float32(offsets)

    def _refine_boxes(
        self, stage: int, offsets: Tensor, boxes: list[Tensor], image_shapes: Sizes
    ) -> list[Tensor]:
        """Return the boxes that a stage predicts, clipped to the image and detached."""
        moved = self.coders[stage].decode(offsets.detach(), boxes)[:, 0]
        parts = moved.split([b.shape[0] for b in boxes])
        return [clip_boxes(b, size) for b, size in zip(parts, image_shapes, strict=True)]

    def _match_boxes(self, stage: int, boxes: list[Tensor], targets: list[Target]) -> Samples:
        """Match boxes with objects by the IoU threshold of a stage; label 0 is background."""
        objects, labels = [], []
        for box, target in zip(boxes, targets, strict=True):
            if len(target["boxes"]):
                match = self.matchers[stage](box_iou(target["boxes"].to(box), box))
            else:
                match = torch.full((len(box),), -1, dtype=torch.int64, device=box.device)
            chosen = match.clamp(min=0)
            known = target["labels"][chosen] if len(target["boxes"]) else chosen
            objects.append(chosen)
            labels.append(torch.where(match >= 0, known, torch.zeros_like(known)))
        return Samples(boxes, objects, labels)

    def _box_losses(
        self, stage: int, logits: Tensor, offsets: Tensor, samples: Samples, targets: list[Target]
    ) -> tuple[Tensor, Tensor]:
        labels = torch.cat(samples.labels)
        positive = torch.where(labels > 0)[0]
        box_targets = []
        for boxes, objects, label, target in zip(
            samples.boxes, samples.objects, samples.labels, targets, strict=True
        ):
            found = label > 0
            true_boxes = target["boxes"].to(boxes)[objects[found]]
            box_targets.append(self.coders[stage].encode_single(true_boxes, boxes[found]))
        offsets = offsets.reshape(len(offsets), -1, 4)
        column = labels[positive] if offsets.shape[1] > 1 else torch.zeros_like(positive)
        box_loss = F.smooth_l1_loss(
            offsets[positive, column], torch.cat(box_targets), beta=self.smooth_l1_beta, reduction="sum"
        )
        return F.cross_entropy(logits, labels), box_loss / len(labels)

    def _mask_loss(
        self, features: dict[str, Tensor], samples: Samples, image_shapes: Sizes, targets: list[Target]
    ) -> Tensor:
        found = [label > 0 for label in samples.labels]
        boxes = [b[keep] for b, keep in zip(samples.boxes, found, strict=True)]
        logits = self._run_masks(features, boxes, image_shapes)
        if not len(logits):
            # DDP needs a gradient for every parameter of the head on every rank.
            return logits.sum() * 0
        labels = torch.cat([label[keep] for label, keep in zip(samples.labels, found, strict=True)])
        mask_targets = torch.cat(
            [
                self._crop_masks(target["masks"], b, objects[keep], logits.shape[-1])
                for target, b, objects, keep in zip(targets, boxes, samples.objects, found, strict=True)
            ]
        )
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(chosen, mask_targets.to(chosen.dtype))

    def _run_masks(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes) -> Tensor:
        crops = self.mask_roi_pool(features, boxes, image_shapes)
        return at_least_float32(self.mask_predictor(self.mask_head(crops)))

    def _crop_masks(self, masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
        """Crop the mask of each box's object to the box, (N, side, side)."""
        rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
        crops = roi_align(
            masks[:, None].to(boxes), rois, (side, side), 1.0, sampling_ratio=-1, aligned=self.exact_masks
        )[:, 0]
        return (crops >= 0.5).to(crops.dtype) if self.exact_masks else crops

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: Sizes,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the boxes, scores and labels (from 1) of each image, sorted by score.

        Args:
            class_logits: (N, num_classes + 1), background first.
            box_regression: offsets (N, 4 (num_classes + 1)).
            proposals: boxes (N_i, 4) of each image.
            image_shapes: height and width of each image before padding.
        """
        counts = [boxes.shape[0] for boxes in proposals]
        decoded = self.coders[-1].decode(box_regression, proposals).split(counts)
        found = []
        for boxes, scores, shape in zip(
            decoded, class_logits.softmax(-1).split(counts), image_shapes, strict=True
        ):
            # Objects only, without the background's column.
            rows, classes = torch.where(scores[:, 1:] > self.score_thresh)
            kept_boxes = clip_boxes(boxes[rows, classes + 1], shape)
            kept_scores = scores[rows, classes + 1]
            best = batched_nms(kept_boxes, kept_scores, classes, self.nms_thresh)[: self.detections_per_img]
            found.append((kept_boxes[best], kept_scores[best], classes[best] + 1))
        boxes, scores, labels = ([image[i] for image in found] for i in range(3))
        return boxes, scores, labels

    def _predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes
    ) -> list[Target]:
        boxes = proposals
        logits, offsets = self._run_stage(0, features, boxes, image_shapes)
        probabilities = [logits.softmax(-1)]
        for stage in range(1, len(self.coders)):
            boxes = self._refine_boxes(stage - 1, offsets, boxes, image_shapes)
            logits, offsets = self._run_stage(stage, features, boxes, image_shapes)
            probabilities.append(logits.softmax(-1))
        if len(probabilities) > 1:
            # torchvision expects logits; the softmax of the log is the mean probability.
            logits = torch.stack(probabilities).mean(0).log()
        if offsets.shape[1] == 4:
            offsets = offsets.repeat(1, logits.shape[1])
        found = self.postprocess_detections(logits, offsets, boxes, image_shapes)
        results = [{"boxes": b, "scores": s, "labels": label} for b, s, label in zip(*found, strict=True)]
        kept = [result["boxes"] for result in results]
        masks = maskrcnn_inference(
            self._run_masks(features, kept, image_shapes), [result["labels"] for result in results]
        )
        return [result | {"masks": mask} for result, mask in zip(results, masks, strict=True)]


class MaskRCNN(GeneralizedRCNN):
    """Two-stage detector: region proposals, then box and mask heads; see `build_detector`."""

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[Target]:
        """Return the losses in training mode, else the predictions.

        Raises:
            UsageError: invalid images or targets, see `DetectionTransform.check`.
        """
        self.transform.check(images, targets)
        result: dict[str, Tensor] | list[Target] = super().forward(images, targets)
        return result

    def detect(self, images: Tensor, sizes: Sequence[ImageSize]) -> list[Target]:
        """Return the predictions of a normalized and padded batch, in pixels of the batch.

        The masks are those of the mask head (N, 1, 28, 28). `torch.export` can trace it, unlike `forward`.

        Args:
            images: (B, C, H, W), sides multiples of 32.
            sizes: height and width of each image before padding.
        """
        maps = cast(Any, self.backbone)(images)
        proposals, _ = cast(Any, self.rpn)(ImageList(images, cast(Any, list(sizes))), maps)
        found: list[Target]
        found, _ = cast(Any, self.roi_heads)(maps, proposals, sizes)
        return found


class _BoxPredictor(nn.Module):
    """Class logits, background first, and box offsets, class-agnostic or per class."""

    def __init__(self, in_features: int, num_classes: int, class_agnostic: bool):
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 if class_agnostic else 4 * (num_classes + 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and offsets of vectors (N, C)."""
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
        channels: pyramid channels.
        strides: strides of the levels to pool from.
        num_classes: object classes.
        cascade: three stages with class-agnostic boxes and LayerNorm in the heads; otherwise one stage.
        score_threshold: minimum score of a prediction.
        detections_per_image: maximum number of predictions per image.
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
