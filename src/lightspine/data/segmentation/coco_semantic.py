"""Label maps painted from the masks of a COCO file."""

from pathlib import Path

import numpy as np

from lightspine.data.detection import CocoAnnotations, decode_segmentation
from lightspine.data.segmentation.folders import LabeledImage
from lightspine.data.segmentation.label_maps import IGNORED, MOST_CLASSES
from lightspine.errors import UsageError

BACKGROUND = "background"


class CocoSemanticLabels:
    """Paints the objects of an image into one map: 0 where there is none, else the object's class + 1.

    The largest object comes first, so that a small one on top of it stays whole. Pixels that only a crowd
    covers have no class: what lies there is not told one by one.

    Args:
        annotations: read with masks.

    Attributes:
        class_names: "background", and the classes of the file.

    Raises:
        UsageError: annotations without masks, or too many classes for one byte per pixel.
    """

    def __init__(self, annotations: CocoAnnotations) -> None:
        if annotations.segmentations is None:
            raise UsageError("expected annotations with masks to paint label maps, got boxes only")
        self.annotations = annotations
        self.class_names = [BACKGROUND, *annotations.class_names]
        if len(self.class_names) > MOST_CLASSES:
            raise UsageError(
                f"expected at most {MOST_CLASSES} classes, got {len(self.class_names)} with the background"
            )

    def pairs(self) -> list[LabeledImage]:
        """Return the images; for `read`, the labels of image number i are called i."""
        return [
            LabeledImage(self.annotations.path(position), Path(str(position)))
            for position in range(len(self.annotations))
        ]

    def read(self, path: str | Path) -> np.ndarray:
        """Return the labels of an image, (height, width), uint8."""
        notes, position = self.annotations, int(str(path))
        assert notes.segmentations is not None  # checked at the start
        height, width = notes.sizes[position].tolist()
        labels = np.zeros((height, width), dtype=np.uint8)
        objects = sorted(
            notes.objects(position), key=lambda number: (not notes.crowd[number], -notes.areas[number])
        )
        for number in objects:
            mask = decode_segmentation(notes.segmentation(number), height, width).astype(bool)
            labels[mask] = IGNORED if notes.crowd[number] else notes.labels[number] + 1
        return labels
