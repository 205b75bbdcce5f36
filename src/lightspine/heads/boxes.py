"""Decoding of box offsets and non-maximum suppression (NMS) as in the published detectors."""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms

_MOST_SHIFTED = 10_000


class ClampedBoxCoder(BoxCoder):
    """Box coder that limits both growth and shrinking of a side, to a factor of 62.5.

    torchvision's limits growth only.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Apply offsets (N, 4 G) to boxes (N, 4)."""
        least = [-torch.inf, -torch.inf, *(-weight * self.bbox_xform_clip for weight in self.weights[2:])]
        limited = rel_codes.unflatten(1, (-1, 4)).maximum(rel_codes.new_tensor(least)).flatten(1)
        decoded: Tensor = super().decode_single(limited, boxes)
        return decoded


def nonempty_boxes(boxes: Tensor) -> Tensor:
    """Return which boxes (N, 4) have a width and height above 0, (N,) bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within groups, such as classes or pyramid levels.

    The groups are moved apart, so that boxes of different groups do not overlap, and suppressed in one pass;
    10,000 boxes or more are suppressed group by group. Moved boxes are rounded to the dtype of `boxes`, as in
    the published detectors: in float32 an IoU within 1e-5 of the threshold may fall on either side.

    Args:
        boxes: x1, y1, x2, y2 (N, 4).
        scores: (N,).
        groups: group of each box from 0, (N,) int64.
        iou_threshold: a box is suppressed if its IoU with a better box of its group is above it.

    Returns:
        Indices of the kept boxes, sorted by score.
    """
    if not len(boxes):
        return groups.new_zeros(0)
    if len(boxes) < _MOST_SHIFTED:
        kept: Tensor = nms(boxes + (groups * (boxes.max() + 1))[:, None].to(boxes), scores, iou_threshold)
        return kept
    found = [torch.where(groups == group)[0] for group in groups.unique()]
    kept = torch.cat([indices[nms(boxes[indices], scores[indices], iou_threshold)] for indices in found])
    kept = kept.sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]
