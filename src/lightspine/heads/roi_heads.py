"""RoIAlign pooling and the box and mask heads of (Cascade) Mask R-CNN."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image, roi_align

from lightspine.errors import UsageError
from lightspine.heads.detection_transform import Target
from lightspine.heads.rpn import at_least_float32


class RoIPooler(MultiScaleRoIAlign):
    """Crop boxes from the level that suits their size (equation 1 of the FPN paper).

    Unlike torchvision's it is given the strides (which torchvision guesses from the first batch it sees, and
    keeps), and samples as the published detectors do: pixel centres at half integers, as many samples per
    bin as it has pixels.

    Args:
        strides: strides of the levels to crop from; the maps are found by them.
        output_size: side of the crops.

    Shape:
        Maps `{str(stride): (B, C, H, W)}` and boxes `(N_i, 4)` in pixels of the image, for each image; output
        `(sum of N_i, C, output_size, output_size)`.
    """

    def __init__(self, strides: Sequence[int], output_size: int):
        super().__init__([str(stride) for stride in strides], output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Crop; `image_shapes` is not needed, it is torchvision's."""
        del image_shapes
        maps = [x[name] for name in self.featmap_names]
        which = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        rois = torch.cat([which, torch.cat(boxes)], dim=1)
        levels = self._levels(rois)
        crops = maps[0].new_zeros((len(rois), maps[0].shape[1], *self.output_size))
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            cropped = roi_align(
                feature, rois[chosen], self.output_size, 1 / stride, sampling_ratio=0, aligned=True
            )
            # Under autocast the crops may come in another precision than the maps.
            crops[chosen] = cropped.to(crops.dtype)
        return crops

    def _levels(self, rois: Tensor) -> Tensor:
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        # A box of 56 to 112 px belongs to stride 4, of 112 to 224 to stride 8...
        level = torch.floor(torch.log2(side / (14 * self.strides[0]) + 1e-6))
        return level.clamp(0, len(self.strides) - 1).long()


Sizes = list[tuple[int, int]]


@dataclass(frozen=True)
class Stage:
    """One stage of a cascade.

    Attributes:
        overlap: least IoU of a proposal with an object to stand for it.
        weights: how the box offsets (x, y, width, height) are scaled.
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
    """The proposals of a batch and what each should become; one entry per image."""

    boxes: list[Tensor]
    objects: list[Tensor]
    labels: list[Tensor]


class CascadeRoIHeads(RoIHeads):
    """Cascade Mask R-CNN's heads (Cai and Vasconcelos, arXiv:1906.09756) as a subclass of torchvision's.

    The boxes of each stage are the proposals of the next, whose objects must overlap more; only the first
    stage samples. In prediction the class probabilities of all stages are averaged and the last stage's
    boxes taken. In training each stage sends a share of 1 / stages of its gradient into the pyramid. The
    masks are learnt from the first stage's samples and predicted for the last stage's boxes.

    With one stage, `smooth_l1_beta=1/9` and `exact_masks=False` it computes what torchvision's own heads do.

    Args:
        box_roi_pool: crops the proposals.
        box_heads: maps the crops to vectors, one for each stage.
        box_predictors: maps the vectors to class logits (N, num_classes + 1), background first, and offsets
            (N, 4) for all classes together, or (N, 4 (num_classes + 1)), which needs a single stage.
        stages: overlap and box weights of each stage.
        mask_roi_pool: crops the boxes for the mask head.
        mask_head: maps these crops to maps.
        mask_predictor: maps the maps to one mask logit per class, background included.
        smooth_l1_beta: where the box loss turns from squared to absolute; 0, as published, is plain L1.
        exact_masks: crop the masks to learn at pixel centres and round them to 0 or 1, as published; else
            as torchvision does.
        score_threshold: least score of a prediction.
        detections_per_image: most predictions of an image.

    Raises:
        UsageError: lists of different lengths.
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
            # Of the last stage: torchvision decodes the final boxes with it.
            bbox_reg_weights=stages[-1].weights,
            score_thresh=score_threshold,
            nms_thresh=0.5,
            detections_per_img=detections_per_image,
            mask_roi_pool=mask_roi_pool,
            mask_head=mask_head,
            mask_predictor=mask_predictor,
        )
        self.coders = [BoxCoder(stage.weights) for stage in stages]
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
        """Return the predictions of each image (none in training) and the losses (none in prediction).

        Args:
            features: maps of the pyramid.
            proposals: boxes (N_i, 4) of each image.
            image_shapes: height and width of each image without padding.
            targets: boxes, labels and masks of each image, for training.

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
                boxes = self._move(stage, offsets, samples.boxes, image_shapes)
                samples = self._match(stage + 1, boxes, targets)
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

    def _move(self, stage: int, offsets: Tensor, boxes: list[Tensor], image_shapes: Sizes) -> list[Tensor]:
        """Return the boxes that a stage predicts, within the image; they carry no gradient."""
        moved = self.coders[stage].decode(offsets.detach(), boxes)[:, 0]
        parts = moved.split([len(b) for b in boxes])
        return [clip_boxes_to_image(b, size) for b, size in zip(parts, image_shapes, strict=True)]

    def _match(self, stage: int, boxes: list[Tensor], targets: list[Target]) -> Samples:
        """Give every box the object that it overlaps enough for a stage, or the background."""
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
        wanted = []
        for boxes, objects, label, target in zip(
            samples.boxes, samples.objects, samples.labels, targets, strict=True
        ):
            found = label > 0
            true_boxes = target["boxes"].to(boxes)[objects[found]]
            wanted.append(self.coders[stage].encode_single(true_boxes, boxes[found]))
        offsets = offsets.reshape(len(offsets), -1, 4)
        column = labels[positive] if offsets.shape[1] > 1 else torch.zeros_like(positive)
        box_loss = F.smooth_l1_loss(
            offsets[positive, column], torch.cat(wanted), beta=self.smooth_l1_beta, reduction="sum"
        )
        return F.cross_entropy(logits, labels), box_loss / len(labels)

    def _mask_loss(
        self, features: dict[str, Tensor], samples: Samples, image_shapes: Sizes, targets: list[Target]
    ) -> Tensor:
        found = [label > 0 for label in samples.labels]
        boxes = [b[keep] for b, keep in zip(samples.boxes, found, strict=True)]
        logits = self._run_masks(features, boxes, image_shapes)
        if not len(logits):
            # A zero that depends on every weight of the head: other processes may have objects.
            return logits.sum() * 0
        labels = torch.cat([label[keep] for label, keep in zip(samples.labels, found, strict=True)])
        wanted = torch.cat(
            [
                self._crop_masks(target["masks"], b, objects[keep], logits.shape[-1])
                for target, b, objects, keep in zip(targets, boxes, samples.objects, found, strict=True)
            ]
        )
        chosen = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(chosen, wanted.to(chosen.dtype))

    def _run_masks(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes) -> Tensor:
        crops = self.mask_roi_pool(features, boxes, image_shapes)
        return at_least_float32(self.mask_predictor(self.mask_head(crops)))

    def _crop_masks(self, masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
        """Return the part of each box's object mask that the box holds, (N, side, side)."""
        rois = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
        crops = roi_align(
            masks[:, None].to(boxes), rois, (side, side), 1.0, sampling_ratio=-1, aligned=self.exact_masks
        )[:, 0]
        return (crops >= 0.5).to(crops.dtype) if self.exact_masks else crops

    def _predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes
    ) -> list[Target]:
        boxes = proposals
        logits, offsets = self._run_stage(0, features, boxes, image_shapes)
        probabilities = [logits.softmax(-1)]
        for stage in range(1, len(self.coders)):
            boxes = self._move(stage - 1, offsets, boxes, image_shapes)
            logits, offsets = self._run_stage(stage, features, boxes, image_shapes)
            probabilities.append(logits.softmax(-1))
        if len(probabilities) > 1:
            # torchvision takes logits: those whose softmax is the mean.
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
