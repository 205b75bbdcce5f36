"""The objects of a COCO file in arrays, without what cannot be used."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightspine.data.detection.masks import Segmentation
from lightspine.data.detection.problems import AnnotationProblems
from lightspine.data.packed import PackedTexts


@dataclass(frozen=True)
class CocoAnnotations:
    """I images with A objects; made by `read_coco`.

    Objects lie image after image, those of image i from `starts[i]` to `starts[i + 1]`. All is kept in
    arrays, which worker processes share with the process that forked them.

    Attributes:
        folder: where the image files lie.
        class_names: name of each class.
        category_ids: number of each class in the file, which may have gaps.
        files: (I,) file names, relative to `folder`.
        image_ids: (I,), int64.
        sizes: (I, 2), int64, height and width in pixels.
        starts: (I + 1,), int64.
        boxes: (A, 4), float64, as in the file: left, top, width, height in pixels.
        labels: (A,), int64, class of each object from 0.
        areas: (A,), float64, of the mask where the file tells it, in square pixels.
        crowd: (A,), bool, whether it stands for a group of objects.
        segmentations: (A,) masks as JSON; `None` where they were not asked for.
        problems: what was left out or mended.
    """

    folder: Path
    class_names: list[str]
    category_ids: list[int]
    files: PackedTexts
    image_ids: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    segmentations: PackedTexts | None
    problems: AnnotationProblems = field(default_factory=AnnotationProblems)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)

    @property
    def aspect_ratios(self) -> np.ndarray:
        """Width / height of every image, (I,)."""
        return np.asarray(self.sizes[:, 1] / self.sizes[:, 0])

    def path(self, position: int) -> Path:
        """Return the file of an image."""
        return self.folder / self.files[position]

    def objects(self, position: int) -> range:
        """Return the positions of an image's objects."""
        return range(int(self.starts[position]), int(self.starts[position + 1]))

    def corners(self, position: int) -> np.ndarray:
        """Return the boxes of an image within its border, (objects, 4): left, top, right, bottom."""
        height, width = self.sizes[position]
        boxes = self.boxes[self.starts[position] : self.starts[position + 1]].copy()
        boxes[:, 2:] += boxes[:, :2]
        return boxes.clip(0, np.array([width, height, width, height]))

    def segmentation(self, object_position: int) -> Segmentation:
        """Return the mask of an object as it stands in the file."""
        if self.segmentations is None:
            raise ValueError("the file was read without masks")
        segmentation: Segmentation = json.loads(self.segmentations[object_position])
        return segmentation

    def count_trained(self) -> np.ndarray:
        """Return how many objects of every image are not crowds, (I,)."""
        single = np.concatenate([[0], np.cumsum(~self.crowd)])
        return np.asarray(single[self.starts[1:]] - single[self.starts[:-1]])

    def to_coco(self) -> dict[str, Any]:
        """Return a COCO file's content: what the scores are measured against.

        Objects are numbered anew from 1: the usual scorers take one numbered 0 for none.
        """
        return {
            "info": {},
            "images": [
                {"id": number, "file_name": name, "height": height, "width": width}
                for number, name, (height, width) in zip(
                    self.image_ids.tolist(), self.files, self.sizes.tolist(), strict=True
                )
            ],
            "annotations": list(self._annotations()),
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }

    def _annotations(self) -> Iterator[dict[str, Any]]:
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
