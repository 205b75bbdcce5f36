"""In-memory COCO annotations."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightspine.data.detection.masks import Segmentation
from lightspine.data.image_folder import draw_val_indices
from lightspine.errors import UsageError
from lightspine.utils.issues import Issues
from lightspine.utils.packed_strings import PackedStrings


@dataclass(frozen=True)
class CocoAnnotations:
    """COCO annotations of I images with A objects, created by `read_coco`.

    The objects of image i are those from `starts[i]` to `starts[i + 1]`. Everything is stored in arrays,
    which data loader workers share without copying.

    Attributes:
        folder: folder of the image files.
        class_names: name of each class.
        category_ids: id of each class in the file; ids may have gaps.
        files: (I,) file names, relative to `folder`.
        image_ids: (I,), int64.
        sizes: (I, 2), int64, height and width in pixels.
        starts: (I + 1,), int64.
        boxes: (A, 4), float64, as in the file: left, top, width, height in pixels.
        labels: (A,), int64, class index of each object from 0.
        areas: (A,), float64, area of the mask if the file has it, in square pixels.
        crowd: (A,), bool, COCO's iscrowd: the annotation covers a group of objects.
        segmentations: (A,) masks as JSON; `None` if they were not read.
        issues: problems that were skipped or repaired.
    """

    folder: Path
    class_names: list[str]
    category_ids: list[int]
    files: PackedStrings
    image_ids: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    segmentations: PackedStrings | None
    issues: Issues = field(default_factory=Issues)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)

    @property
    def aspect_ratios(self) -> np.ndarray:
        """Width / height of every image, (I,)."""
        return np.asarray(self.sizes[:, 1] / self.sizes[:, 0])

    def path(self, position: int) -> Path:
        """Return the path of an image."""
        return self.folder / self.files[position]

    def objects(self, position: int) -> range:
        """Return the positions of an image's objects."""
        return range(int(self.starts[position]), int(self.starts[position + 1]))

    def corners(self, position: int) -> np.ndarray:
        """Return the boxes of an image, clipped to the image, (objects, 4): left, top, right, bottom."""
        height, width = self.sizes[position]
        boxes = self.boxes[self.starts[position] : self.starts[position + 1]].copy()
        boxes[:, 2:] += boxes[:, :2]
        return boxes.clip(0, np.array([width, height, width, height]))

    def segmentation(self, object_position: int) -> Segmentation:
        """Return the mask of an object as stored in the file."""
        if self.segmentations is None:
            raise ValueError("the file was read without masks")
        segmentation: Segmentation = json.loads(self.segmentations[object_position])
        return segmentation

    def count_non_crowd(self) -> np.ndarray:
        """Return the number of objects of every image that are not crowds, (I,)."""
        single = np.concatenate([[0], np.cumsum(~self.crowd)])
        return np.asarray(single[self.starts[1:]] - single[self.starts[:-1]])

    def to_coco(self) -> dict[str, Any]:
        """Return the annotations in the COCO format, as ground truth for COCO metrics.

        Objects are numbered from 1, because COCO evaluators treat an object with id 0 as unmatched.
        """
        return {
            "info": {},
            "images": [
                {"id": number, "file_name": name, "height": height, "width": width}
                for number, name, (height, width) in zip(
                    self.image_ids.tolist(), self.files, self.sizes.tolist(), strict=True
                )
            ],
            "annotations": list(self._coco_annotations()),
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }

    def _coco_annotations(self) -> Iterator[dict[str, Any]]:
        for position, image_id in enumerate(self.image_ids.tolist()):
            for number in self.objects(position):
                annotation = {
                    "id": number + 1,
                    "image_id": image_id,
                    "category_id": self.category_ids[self.labels[number]],
                    "bbox": self.boxes[number].tolist(),
                    "area": float(self.areas[number]),
                    "iscrowd": int(self.crowd[number]),
                }
                if self.segmentations is not None:
                    annotation["segmentation"] = self.segmentation(number)
                yield annotation


def select_images(annotations: CocoAnnotations, positions: np.ndarray) -> CocoAnnotations:
    """Return a subset of the images, in the given order.

    Args:
        annotations: annotations of all images.
        positions: (images,), integers from 0.
    """
    return _select(annotations, positions, np.ones(len(annotations.crowd), dtype=bool))


def select_for_training(annotations: CocoAnnotations) -> CocoAnnotations:
    """Select training images as in the published recipes: drop crowds, then images without objects.

    Raises:
        UsageError: no image is left.
    """
    positions = np.flatnonzero(annotations.count_non_crowd())
    if not len(positions):
        raise UsageError(f"expected at least one image with objects among {len(annotations)}, got none")
    return _select(annotations, positions, ~annotations.crowd)


def _select(annotations: CocoAnnotations, positions: np.ndarray, keep: np.ndarray) -> CocoAnnotations:
    chosen = [
        [number for number in annotations.objects(int(position)) if keep[number]] for position in positions
    ]
    objects = np.array([number for group in chosen for number in group], dtype=np.int64)
    masks = annotations.segmentations
    return replace(
        annotations,
        files=PackedStrings.pack(annotations.files[int(position)] for position in positions),
        image_ids=annotations.image_ids[positions],
        sizes=annotations.sizes[positions],
        starts=np.cumsum([0, *map(len, chosen)], dtype=np.int64),
        boxes=annotations.boxes[objects],
        labels=annotations.labels[objects],
        areas=annotations.areas[objects],
        crowd=annotations.crowd[objects],
        segmentations=None if masks is None else PackedStrings.pack(masks[int(number)] for number in objects),
    )


def hold_out(
    annotations: CocoAnnotations, fraction: float, seed: int
) -> tuple[CocoAnnotations, CocoAnnotations]:
    """Split the images of a COCO file into training and validation.

    Args:
        annotations: annotations of all images.
        fraction: share of the images, between 0 and 1, for validation; at least one image.
        seed: seed of the split.

    Raises:
        UsageError: a fraction outside 0 to 1, or fewer than two images.
    """
    count = len(annotations)
    chosen = draw_val_indices(count, fraction, np.random.default_rng(seed), str(annotations.folder))
    is_val = np.isin(np.arange(count), sorted(chosen))
    return (
        select_images(annotations, np.flatnonzero(~is_val)),
        select_images(annotations, np.flatnonzero(is_val)),
    )
