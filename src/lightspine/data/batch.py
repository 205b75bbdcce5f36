"""What readers hand to the training: items, batches, and the images that were left out on the way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BadImage(NamedTuple):
    """An image that was skipped, and the sentence that says why."""

    path: str
    reason: str


class Item(NamedTuple):
    """What a dataset gives for one index; no image where none could be read."""

    image: Tensor | None
    label: int
    bad: tuple[BadImage, ...] = ()


class Batch(NamedTuple):
    """A batch of N images.

    Attributes:
        images: (N, 3, H, W), float32; N may be 0 in an evaluation where every image of the batch was bad.
        labels: (N,), int64.
        bad: the images that were skipped on the way; worker processes report through it.
    """

    images: Tensor
    labels: Tensor
    bad: list[BadImage]


def collate_images(items: Sequence[Item]) -> Batch:
    """Stack the items that have an image, and gather what was skipped."""
    images = [item.image for item in items if item.image is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([item.label for item in items if item.image is not None], dtype=torch.int64),
        [bad for item in items for bad in item.bad],
    )
