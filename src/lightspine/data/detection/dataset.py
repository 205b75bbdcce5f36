"""COCO detection dataset: boxes, labels and masks in the format of torchvision's detectors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.bad_images import BadImage, BadImageTolerantDataset
from lightspine.data.detection.annotations import CocoAnnotations
from lightspine.data.detection.masks import decode_segmentation
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import open_image

Target = dict[str, Tensor]
"""Annotations of one image with N objects, in the format of torchvision's detectors.

`boxes` (N, 4) float32, left, top, right, bottom in pixels; `labels` (N,) int64, class + 1 because 0 is the
background; `masks` (N, H, W) uint8, if masks were read; `area` (N,) float32 in square pixels of the original
image; `iscrowd` (N,) int64; `image_id` () int64; `orig_size` (2,) int64, height and width before
augmentation.
"""

DetectionTransform = Callable[[Any, Target], tuple[Any, Target]]


class DetectionItem(NamedTuple):
    """One image with its annotations; `image` is `None` if it could not be read."""

    image: Tensor | None
    target: Target
    bad: tuple[BadImage, ...] = ()


class DetectionBatch(NamedTuple):
    """Images of any sizes with their annotations.

    Attributes:
        images: each (3, H, W), float32, from 0 to 1; empty in evaluation if every image was bad.
        targets: one for each image.
        bad: images that were skipped.
    """

    images: list[Tensor]
    targets: list[Target]
    bad: list[BadImage]


def collate_detection(items: Sequence[DetectionItem]) -> DetectionBatch:
    """Collate items into lists; items without an image are left out."""
    return DetectionBatch(
        [item.image for item in items if item.image is not None],
        [item.target for item in items if item.image is not None],
        [bad for item in items for bad in item.bad],
    )


class DetectionDataset(BadImageTolerantDataset[DetectionItem]):
    """Map-style dataset of the images of a COCO file with boxes, labels and masks.

    After the transform, boxes are clipped to the image, and objects are removed whose box is smaller than
    `min_side` or whose mask has no pixel left.

    Args:
        annotations: images and objects; items have masks if the file was read with masks.
        transform: transforms a uint8 image (3, H, W) together with its target: one of
            `create_detection_transform` or any of `torchvision.transforms.v2`.
        replace_bad: see `BadImageTolerantDataset`.
        min_side: smallest width and height in pixels of a box after the transform.

    Raises:
        UsageError: there is no image.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        transform: DetectionTransform | None = None,
        *,
        replace_bad: bool = False,
        min_side: float = 1.0,
    ) -> None:
        if not len(annotations):
            raise UsageError("expected at least one image, got none")
        super().__init__(replace_bad=replace_bad)
        self.annotations = annotations
        self.transform = transform
        self.min_side = min_side

    def __len__(self) -> int:
        return len(self.annotations)

    def image_name(self, position: int) -> str:
        """Return the path of an image."""
        return str(self.annotations.path(position))

    def read(self, position: int) -> tuple[Image.Image, Target]:
        """Read an image and its annotations.

        Raises:
            LightspineError: the image cannot be read, has another size than the file says, or a mask is
                damaged.
        """
        path = self.annotations.path(position)
        image = open_image(path)
        height, width = self.annotations.sizes[position].tolist()
        if image.size != (width, height):
            raise LightspineError(
                f"image {path} is {image.width}x{image.height} px, but its objects are annotated for "
                f"{width}x{height}"
            )
        return image, self._target(position)

    def make_item(
        self,
        position: int,  # noqa: ARG002
        content: tuple[Image.Image, Target] | None,
        bad: tuple[BadImage, ...],
    ) -> DetectionItem:
        """Transform an image and its annotations."""
        if content is None:
            return DetectionItem(None, {}, bad)
        image, target = content
        pixels: Any = tv_tensors.Image(F.pil_to_tensor(image))
        if self.transform is not None:
            pixels, target = self.transform(pixels, target)
        pixels = F.to_dtype(pixels, torch.float32, scale=True).as_subclass(torch.Tensor)
        target = {name: value.as_subclass(torch.Tensor) for name, value in target.items()}
        return DetectionItem(pixels, _keep_visible(target, pixels.shape[-2:], self.min_side), bad)

    def _target(self, position: int) -> Target:
        annotations = self.annotations
        objects = annotations.objects(position)
        part = slice(objects.start, objects.stop)
        height, width = annotations.sizes[position].tolist()
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(annotations.corners(position).astype(np.float32)),
            format="XYXY",
            canvas_size=(height, width),
        )
        target: Target = {
            "boxes": boxes,
            "labels": torch.from_numpy(annotations.labels[part] + 1),
            "area": torch.from_numpy(annotations.areas[part].astype(np.float32)),
            "iscrowd": torch.from_numpy(annotations.crowd[part].astype(np.int64)),
            "image_id": torch.tensor(int(annotations.image_ids[position])),
            "orig_size": torch.tensor([height, width]),
        }
        if annotations.segmentations is not None:
            masks = np.zeros((len(objects), height, width), dtype=np.uint8)
            for mask, number in zip(masks, objects, strict=True):
                mask[:] = decode_segmentation(annotations.segmentation(number), height, width)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target


def _keep_visible(target: Target, size: torch.Size, min_side: float) -> Target:
    """Clip boxes to the image and remove objects that are too small or have an empty mask."""
    height, width = size
    boxes = target["boxes"]
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    kept = (boxes[:, 2:] - boxes[:, :2] >= min_side).all(dim=1)
    target = target | {"boxes": boxes}
    if "masks" in target and len(boxes):
        kept &= target["masks"].flatten(1).amax(dim=1) > 0
    if kept.all():
        return target
    return target | {
        name: target[name][kept] for name in ("boxes", "labels", "area", "iscrowd", "masks") if name in target
    }
