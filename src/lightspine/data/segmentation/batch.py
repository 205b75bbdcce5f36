"""What the segmentation data hands to the training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightspine.data.batch import BadImage


class SegmentationItem(NamedTuple):
    """What a dataset gives for one index; no image where none could be read.

    Attributes:
        image: (3, H, W), float32, normalised.
        labels: (H, W), int64.
        name: what names the image to a user.
        bad: the images that were skipped on the way.
    """

    image: Tensor | None
    labels: Tensor | None
    name: str
    bad: tuple[BadImage, ...] = ()


class SegmentationBatch(NamedTuple):
    """Images and labels; stacked for training, in lists where sizes may differ.

    Attributes:
        images: (N, 3, H, W), or N images (3, H, W), float32, normalised.
        labels: (N, H, W), or N label maps (H, W), int64. Outside training they have the size of the file,
            whatever the image was resized to.
        names: what names each image to a user.
        bad: the images that were skipped on the way.
    """

    images: Tensor | list[Tensor]
    labels: Tensor | list[Tensor]
    names: list[str]
    bad: list[BadImage]


def collate_segmentation(items: Sequence[SegmentationItem]) -> SegmentationBatch:
    """Stack items of one size, and gather what was skipped."""
    batch = list_segmentation(items)
    if not batch.names:
        return batch
    return batch._replace(images=torch.stack(list(batch.images)), labels=torch.stack(list(batch.labels)))


def list_segmentation(items: Sequence[SegmentationItem]) -> SegmentationBatch:
    """Gather items of any sizes in lists, and what was skipped."""
    return SegmentationBatch(
        [item.image for item in items if item.image is not None],
        [item.labels for item in items if item.labels is not None],
        [item.name for item in items if item.image is not None],
        [bad for item in items for bad in item.bad],
    )
