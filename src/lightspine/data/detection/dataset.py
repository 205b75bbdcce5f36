"""Images of a COCO file with their objects."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.batch import BadImage
from lightspine.data.detection.annotations import CocoAnnotations
from lightspine.data.detection.batch import DetectionItem, Target
from lightspine.data.detection.masks import decode_segmentation
from lightspine.data.images import open_image
from lightspine.data.packed import PackedTexts
from lightspine.errors import LightspineError, UsageError

DetectionTransform = Callable[[Any, Target], tuple[Any, Target]]


class DetectionDataset(Dataset[DetectionItem]):
    """Reads the images of a COCO file with boxes, labels and masks as torchvision's detectors take them.

    After the transform boxes are cut at the border, and objects go that have become smaller than `min_side`
    or have no pixel of their mask left.

    Args:
        annotations: the images and objects; masks are given where it was read with them.
        transform: changes an image, uint8 (3, H, W), and its target together: one of `detection_transforms`
            or any of `torchvision.transforms.v2`. `None` leaves them.
        replace_bad: give the next readable image in place of a bad one, so that training batches keep their
            size; without it the item has no image, so that an evaluation counts no image twice.
        min_side: least width and height in pixels of a box after the transform.

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
            raise UsageError("expected at least one image to detect objects in, got none")
        self.annotations = annotations
        self.transform = transform
        self.replace_bad = replace_bad
        self.min_side = min_side
        # Known to this process only: saves reading a bad image again while a replacement is sought.
        self._known_bad: dict[int, BadImage] = {}

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> DetectionItem:
        # Without it a loop over the dataset would never end.
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        bad: list[BadImage] = []
        for offset in range(len(self) if self.replace_bad else 1):
            position = (index + offset) % len(self)
            if position not in self._known_bad:
                try:
                    image = self._open(position)
                    target = self._target(position)
                except LightspineError as error:
                    path = self.annotations.path(position)
                    self._known_bad[position] = BadImage(str(path), str(error))
                else:
                    return self._item(image, target, tuple(bad))
            bad.append(self._known_bad[position])
        return DetectionItem(None, {}, tuple(bad))

    def _open(self, position: int) -> Image.Image:
        path = self.annotations.path(position)
        image = open_image(path)
        height, width = self.annotations.sizes[position].tolist()
        if image.size != (width, height):
            raise LightspineError(
                f"image {path} is {image.width}x{image.height} px, but its objects are drawn for "
                f"{width}x{height}"
            )
        return image

    def _target(self, position: int) -> Target:
        notes = self.annotations
        objects = notes.objects(position)
        part = slice(objects.start, objects.stop)
        height, width = notes.sizes[position].tolist()
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(notes.corners(position).astype(np.float32)),
            format="XYXY",
            canvas_size=(height, width),
        )
        target: Target = {
            "boxes": boxes,
            "labels": torch.from_numpy(notes.labels[part] + 1),
            "area": torch.from_numpy(notes.areas[part].astype(np.float32)),
            "iscrowd": torch.from_numpy(notes.crowd[part].astype(np.int64)),
            "image_id": torch.tensor(int(notes.image_ids[position])),
            "orig_size": torch.tensor([height, width]),
        }
        if notes.segmentations is not None:
            masks = np.zeros((len(objects), height, width), dtype=np.uint8)
            for mask, number in zip(masks, objects, strict=True):
                mask[:] = decode_segmentation(notes.segmentation(number), height, width)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target

    def _item(self, image: Image.Image, target: Target, bad: tuple[BadImage, ...]) -> DetectionItem:
        pixels: Any = tv_tensors.Image(F.pil_to_tensor(image))
        if self.transform is not None:
            pixels, target = self.transform(pixels, target)
        pixels = F.to_dtype(pixels, torch.float32, scale=True).as_subclass(torch.Tensor)
        target = {name: value.as_subclass(torch.Tensor) for name, value in target.items()}
        return DetectionItem(pixels, _keep_visible(target, pixels.shape[-2:], self.min_side), bad)


def select_images(annotations: CocoAnnotations, positions: np.ndarray) -> CocoAnnotations:
    """Return some of the images, in the given order.

    Args:
        annotations: of all images.
        positions: (images,), whole numbers from 0.
    """
    return _select(annotations, positions, np.ones(len(annotations.crowd), dtype=bool))


def select_trained(annotations: CocoAnnotations) -> CocoAnnotations:
    """Return what the published recipes train on: images with objects, and no crowds.

    Raises:
        UsageError: no image is left.
    """
    positions = np.flatnonzero(annotations.count_trained())
    if not len(positions):
        raise UsageError(f"expected an image with objects to train on among {len(annotations)}, got none")
    return _select(annotations, positions, ~annotations.crowd)


def _select(annotations: CocoAnnotations, positions: np.ndarray, wanted: np.ndarray) -> CocoAnnotations:
    chosen = [
        [number for number in annotations.objects(int(position)) if wanted[number]] for position in positions
    ]
    objects = np.array([number for group in chosen for number in group], dtype=np.int64)
    masks = annotations.segmentations
    return replace(
        annotations,
        files=PackedTexts.pack(annotations.files[int(position)] for position in positions),
        image_ids=annotations.image_ids[positions],
        sizes=annotations.sizes[positions],
        starts=np.cumsum([0, *map(len, chosen)], dtype=np.int64),
        boxes=annotations.boxes[objects],
        labels=annotations.labels[objects],
        areas=annotations.areas[objects],
        crowd=annotations.crowd[objects],
        segmentations=None if masks is None else PackedTexts.pack(masks[int(number)] for number in objects),
    )


def _keep_visible(target: Target, size: torch.Size, min_side: float) -> Target:
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
