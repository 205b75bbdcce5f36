"""Region proposal network (RPN): anchors, anchor matching, losses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from lightspine.heads.boxes import (
    ClampedBoxCoder,
    ImageSize,
    batched_nms,
    best_indices,
    clip_boxes,
    nonempty_boxes,
)


class StridedAnchors(AnchorGenerator):
    """Anchor generator with given strides and unrounded sizes.

    torchvision infers strides from feature map sizes, which is wrong if a size was rounded (800 px at stride
    64 give 13 pixels, that is stride 61), and rounds anchor corners, which the published detectors do not.

    Args:
        strides: stride of each level in image pixels.
        scales: anchor sizes in strides.
        aspect_ratios: height / width at constant area.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scales: Sequence[float],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ):
        self.strides = tuple(strides)
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(aspect_ratios),) * len(sizes))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (torchvision's signature)
    ) -> Tensor:
        """Return one level's anchors (x1, y1, x2, y2) centered at the origin, grouped by aspect ratio."""
        sides = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        # By the reciprocal, as published: it differs from a division in the last bit.
        widths = (sides[None, :] * (1 / roots[:, None])).flatten()
        heights = (sides[None, :] * roots[:, None]).flatten()
        return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of all levels, (N, 4) for each image."""
        anchors = torch.cat(self.level_anchors(feature_maps))
        return [anchors for _ in image_list.image_sizes]

    def level_anchors(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchor boxes (N, 4) of each pyramid level."""
        device = feature_maps[0].device
        # float32 even for half-precision maps: half precision cannot hold pixel coordinates.
        self.set_cell_anchors(torch.promote_types(feature_maps[0].dtype, torch.float32), device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        levels: list[Tensor] = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        return levels


class MinOverlapMatcher(Matcher):
    """torchvision's IoU matcher with a minimum overlap for low-quality matches.

    An object without an anchor above `high` is matched to its best anchors, but only if their IoU is at
    least `min_overlap`.

    Args:
        high: minimum IoU of a positive anchor.
        low: IoU below which an anchor is background.
        min_overlap: minimum IoU of a low-quality match.
    """

    def __init__(self, high: float, low: float, min_overlap: float):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.min_overlap = min_overlap

    def set_low_quality_matches_(
        self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor
    ) -> None:
        """Match, in place, the anchors with the highest IoU for some object."""
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        # An object outside the image has IoU 0 with every anchor, so every anchor would be its best.
        is_best = (match_quality_matrix == best) & (best >= self.min_overlap) & (best > 0)
        chosen = is_best.any(dim=0)
        matches[chosen] = all_matches[chosen]


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half-precision tensors to float32; above 512, bfloat16 coordinates are 4 px apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32RPNHead(RPNHead):
    """torchvision's RPN head with float32 outputs under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness logits and box offsets, each one tensor per level."""
        logits, offsets = super().forward(x)
        return [at_least_float32(y) for y in logits], [at_least_float32(y) for y in offsets]


class ProposalNetwork(RegionProposalNetwork):
    """RPN with the published settings: one anchor size of 8 strides, three aspect ratios, L1 box loss.

    256 anchors are sampled per image.

    Args:
        channels: pyramid channels.
        strides: stride of each level.
        convs: 3x3 convolutions before the predictions: 1 in Mask R-CNN, 2 in ViTDet.
        min_overlap: see `MinOverlapMatcher`.
        anchor_scale: factor of the anchor size.
    """

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        *,
        convs: int = 1,
        min_overlap: float = 0.3,
        anchor_scale: float = 1.0,
    ):
        anchors = StridedAnchors(strides, scales=(8.0 * anchor_scale,))
        super().__init__(
            anchors,
            Float32RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.proposal_matcher = MinOverlapMatcher(0.7, 0.3, min_overlap)
        self.box_coder = ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: Sequence[ImageSize],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the proposals and scores of each image.

        The best boxes of every level are clipped to the image, those without area are removed, and boxes of a
        level suppress each other.

        Args:
            proposals: boxes (B, N, 4) of all levels.
            objectness: logits (B N, 1).
            image_shapes: height and width of each image before padding.
            num_anchors_per_level: number of boxes of each level.
        """
        logits = objectness.detach().reshape(len(proposals), -1)
        chosen, levels, start = [], [], 0
        for level, count in enumerate(num_anchors_per_level):
            best = best_indices(logits[:, start : start + count], self.pre_nms_top_n())
            chosen.append(best + start)
            levels.append(torch.full_like(best, level))
            start += count
        found = []
        for boxes, image_logits, indices, level_of_box, shape in zip(
            proposals, logits, torch.cat(chosen, 1), torch.cat(levels, 1), image_shapes, strict=True
        ):
            boxes = clip_boxes(boxes[indices], shape)
            nonempty = torch.where(nonempty_boxes(boxes))[0]
            boxes, scores = boxes[nonempty], image_logits[indices[nonempty]].sigmoid()
            kept = batched_nms(boxes, scores, level_of_box[nonempty], self.nms_thresh)
            kept = kept[: self.post_nms_top_n()]
            found.append((boxes[kept], scores[kept]))
        return [boxes for boxes, _ in found], [scores for _, scores in found]

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the objectness loss and the box loss, averaged over the sampled anchors."""
        positives, negatives = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(positives))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(negatives))[0]])
        targets = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets, reduction="sum") / max(len(sampled), 1)
        sampled_labels = torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], sampled_labels), box_loss
