"""Anchors, anchor matching and the region proposal network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead


def at_least_float32(x: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own precision where that is higher."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Float32RPNHead(RPNHead):
    """torchvision's head of the proposal network, its outputs in full precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map the levels to objectness logits and box offsets, one tensor per level each."""
        logits, offsets = super().forward(x)
        return [at_least_float32(y) for y in logits], [at_least_float32(y) for y in offsets]


class Float32RetinaNetHead(RetinaNetHead):
    """torchvision's head of RetinaNet, its outputs in full precision."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Map the levels to class logits (B, N, classes) and box offsets (B, N, 4)."""
        return {name: at_least_float32(y) for name, y in super().forward(x).items()}


class StridedAnchors(AnchorGenerator):
    """Anchors of given strides and exact sizes.

    torchvision infers the strides from the sizes of the maps, which is wrong where a map's size was rounded
    (800 px at stride 64 are 13 pixels: 61), and rounds the anchors' corners, which the published detectors
    do not.

    Args:
        strides: stride of each level, in pixels of the image.
        scales: sides of the square anchors, in strides.
        aspect_ratios: height over width; the area stays.
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
        """Return one level's anchors (x1, y1, x2, y2) around the origin, the scales of a ratio together."""
        sides = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths = (sides[None, :] / roots[:, None]).flatten()
        heights = (sides[None, :] * roots[:, None]).flatten()
        return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of all levels, (N, 4) for each image."""
        device = feature_maps[0].device
        # In float32 though the maps be in half precision, which cannot hold pixel coordinates.
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        levels = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        anchors = torch.cat(levels)
        return [anchors for _ in image_list.image_sizes]


class MinOverlapMatcher(Matcher):
    """torchvision's matcher, whose last resort needs a least overlap.

    Where no anchor overlaps an object by `high`, the best ones are matched all the same, but only from
    `least` on: an object that all anchors miss teaches nothing.
    """

    def __init__(self, high: float, low: float, least: float):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.least = least

    def set_low_quality_matches_(
        self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor
    ) -> None:
        """Match, in place, the anchors that overlap some object best."""
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        # An object that lies outside the image overlaps all anchors alike: not at all.
        is_best = (match_quality_matrix == best) & (best >= self.least) & (best > 0)
        chosen = is_best.any(dim=0)
        matches[chosen] = all_matches[chosen]


class ProposalNetwork(RegionProposalNetwork):
    """RPN: anchors of one scale (8 strides) and three ratios, L1 box loss, 256 anchors sampled per image.

    Args:
        channels: width of the pyramid.
        strides: strides of its levels.
        convs: 3x3 convolutions before the predictions, 1 in Mask R-CNN and 2 in ViTDet.
        least_overlap: see `MinOverlapMatcher`.
        anchor_scale: factor of the anchors' sides.
    """

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        *,
        convs: int = 1,
        least_overlap: float = 0.3,
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
        self.proposal_matcher = MinOverlapMatcher(0.7, 0.3, least_overlap)

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and of boxes, both averaged over the sampled anchors."""
        positives, negatives = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(positives))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(negatives))[0]])
        targets = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets, reduction="sum") / max(len(sampled), 1)
        wanted = torch.cat(labels)[sampled]
        return F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted), box_loss
