"""Put the small square masks that a mask head predicts into the image, exact to a part of a pixel."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return each mask in its place in the image, 0 outside its box.

    The mask is read by bilinear interpolation at the centre of every pixel, as the published detectors do
    (torchvision rounds the boxes to whole pixels): at 0.5 a mask of ones holds the pixels whose centres lie
    in the box.

    Args:
        masks: probabilities (N, 1, M, M).
        boxes: x1, y1, x2, y2 (N, 4) in pixels of the image.
        size: height and width of the image.

    Returns:
        Probabilities (N, 1, height, width).
    """
    height, width = size
    pasted = masks.new_zeros((len(masks), 1, height, width))
    # All corners at once: on a GPU each transfer waits for it.
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        # A pixel more at each side, where the interpolation fades out.
        rows = slice(max(math.floor(top) - 1, 0), min(math.ceil(bottom) + 1, height))
        columns = slice(max(math.floor(left) - 1, 0), min(math.ceil(right) + 1, width))
        if rows.start >= rows.stop or columns.start >= columns.stop or right <= left or bottom <= top:
            continue
        y = torch.arange(rows.start, rows.stop, device=boxes.device) + 0.5
        x = torch.arange(columns.start, columns.stop, device=boxes.device) + 0.5
        # -1 and 1 are the sides of the box.
        y = (y - top) / (bottom - top) * 2 - 1
        x = (x - left) / (right - left) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(masks.dtype)
        pasted[i, :, rows, columns] = F.grid_sample(masks[i, None], grid[None], align_corners=False)[0]
    return pasted
