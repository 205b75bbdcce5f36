"""The region proposal network with the published loss and matching."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.rpn import RegionProposalNetwork

from lightspine.heads.anchors import StridedAnchors
from lightspine.heads.precision import PreciseRPNHead


class FlooredMatcher(Matcher):
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
        least_overlap: see `FlooredMatcher`.
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
            PreciseRPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.proposal_matcher = FlooredMatcher(0.7, 0.3, least_overlap)

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
