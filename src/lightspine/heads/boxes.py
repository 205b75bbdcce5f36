"""Decoding of box offsets and non-maximum suppression (NMS) as in the published detectors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms

from lightspine.ops.dispatch import is_exporting

ImageSize = tuple[int | Tensor, int | Tensor]
"""Height and width of an image in pixels; tensors without a dimension in `torch.export`."""

_MOST_SHIFTED = 10_000


def best_indices(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores (..., N), or of all N, highest first."""
    # The number of scores may be a symbol of `torch.export`, which `min` would fix to that of the example.
    return scores.topk(torch.sym_min(count, scores.shape[-1])).indices


class ClampedBoxCoder(BoxCoder):
    """Box coder that limits both growth and shrinking of a side, to a factor of 62.5.

    torchvision's limits growth only.
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Apply offsets (N, 4 G) to boxes (N, 4); returns (N, 4 G)."""
        least = [-torch.inf, -torch.inf, *(-weight * self.bbox_xform_clip for weight in self.weights[2:])]
        limited = rel_codes.unflatten(1, (-1, 4)).maximum(rel_codes.new_tensor(least)).flatten(1)
        decoded: Tensor = super().decode_single(limited, boxes)
        return decoded

    def decode(self, rel_codes: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Apply offsets (N, 4 G) to the N boxes of all images; returns (N, G, 4)."""
        return self.decode_single(rel_codes, torch.cat(list(boxes))).unflatten(1, (-1, 4))


def clip_boxes(boxes: Tensor, size: ImageSize) -> Tensor:
    """Clip boxes x1, y1, x2, y2 (..., 4) to an image of this height and width."""
    height, width = size
    if isinstance(height, Tensor) and isinstance(width, Tensor):
        # torch.clamp takes no pair of a number and a tensor.
        limits = torch.stack([width, height, width, height]).to(boxes)
        return boxes.clamp(min=0).minimum(limits)
    clipped: Tensor = clip_boxes_to_image(boxes, (height, width))
    return clipped


def nonempty_boxes(boxes: Tensor) -> Tensor:
    """Return which boxes (N, 4) have a width and height above 0, (N,) bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within groups, such as classes or pyramid levels.

    The groups are moved apart, so that boxes of different groups do not overlap, and suppressed in one pass;
    10,000 boxes or more are suppressed group by group, except in an exported detector, which moves any number
    of boxes. Moved boxes are rounded to the dtype of `boxes`, as in the published detectors: in float32 an
    IoU within 1e-5 of the threshold may fall on either side.

    Args:
        boxes: x1, y1, x2, y2 (N, 4).
        scores: (N,).
        groups: group of each box from 0, (N,) int64.
        iou_threshold: a box is suppressed if its IoU with a better box of its group is above it.

    Returns:
        Indices of the kept boxes, sorted by score.
    """
    # torch.export knows the number of boxes only as a symbol.
    if is_exporting() or len(boxes) < _MOST_SHIFTED:
        # The 0 is the largest coordinate of no boxes.
        largest = F.pad(boxes.flatten(), (0, 1)).max()
        kept: Tensor = nms(boxes + (groups * (largest + 1))[:, None].to(boxes), scores, iou_threshold)
        return kept
    found = [torch.where(groups == group)[0] for group in groups.unique()]
    kept = torch.cat([indices[nms(boxes[indices], scores[indices], iou_threshold)] for indices in found])
    kept = kept.sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]
