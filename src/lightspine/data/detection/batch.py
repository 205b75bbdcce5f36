"""What the detection data hands to the training."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightspine.data.batch import BadImage

Target = dict[str, Tensor]
"""Of one image with N objects, as torchvision's detectors take it.

`boxes` (N, 4) float32, left, top, right, bottom in pixels; `labels` (N,) int64, class + 1 as 0 is the
background; `masks` (N, H, W) uint8, where they were asked for; `area` (N,) float32 in square pixels of the
original image; `iscrowd` (N,) int64; `image_id` () int64; `orig_size` (2,) int64, height and width before
augmentation.
"""


class DetectionItem(NamedTuple):
    """What a dataset gives for one index; no image where none could be read."""

    image: Tensor | None
    target: Target
    bad: tuple[BadImage, ...] = ()


class DetectionBatch(NamedTuple):
    """Images of any sizes with their objects.

    Attributes:
        images: each (3, H, W), float32, 0..1; none where every image of an evaluation's batch was bad.
        targets: one for each image.
        bad: the images that were skipped on the way.
    """

    images: list[Tensor]
    targets: list[Target]
    bad: list[BadImage]


def collate_detection(items: Sequence[DetectionItem]) -> DetectionBatch:
    """Gather the items that have an image, and what was skipped."""
    return DetectionBatch(
        [item.image for item in items if item.image is not None],
        [item.target for item in items if item.image is not None],
        [bad for item in items for bad in item.bad],
    )
