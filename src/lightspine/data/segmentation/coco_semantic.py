"""Semantic label maps from the instance masks of COCO files."""

from pathlib import Path

import numpy as np

from lightspine.data.detection import CocoAnnotations, decode_segmentation
from lightspine.data.segmentation.folders import LabeledImage
from lightspine.data.segmentation.label_maps import IGNORED, MAX_CLASSES
from lightspine.errors import UsageError

BACKGROUND = "background"


class CocoSemanticLabels:
    """Semantic label maps drawn from COCO instance masks: 0 is background, else the object's class + 1.

    Larger objects are drawn first, so that small objects on top of them remain complete. Pixels that only a
    crowd covers are ignored, because a crowd's mask also covers pixels between its objects.

    Args:
        annotations: annotations with masks.

    Attributes:
        class_names: "background", then the classes of the file.

    Raises:
        UsageError: annotations without masks, or too many classes for one byte per pixel.
    """

    def __init__(self, annotations: CocoAnnotations) -> None:
        if annotations.segmentations is None:
            raise UsageError("expected annotations with masks for label maps, got boxes only")
        self.annotations = annotations
        self.class_names = [BACKGROUND, *annotations.class_names]
        if len(self.class_names) > MAX_CLASSES:
            raise UsageError(
                f"expected at most {MAX_CLASSES} classes, got {len(self.class_names)} with the background"
            )

    def pairs(self) -> list[LabeledImage]:
        """Return the images, with their positions as the names of their label maps."""
        return [
            LabeledImage(self.annotations.path(position), Path(str(position)))
            for position in range(len(self.annotations))
        ]

    def read(self, path: str | Path) -> np.ndarray:
        """Return the label map of an image by its position, (height, width), uint8."""
        annotations, position = self.annotations, int(str(path))
        assert annotations.segmentations is not None  # checked in __init__
        height, width = annotations.sizes[position].tolist()
        labels = np.zeros((height, width), dtype=np.uint8)
        objects = sorted(
            annotations.objects(position),
            key=lambda number: (not annotations.crowd[number], -annotations.areas[number]),
        )
        for number in objects:
            mask = decode_segmentation(annotations.segmentation(number), height, width).astype(bool)
            labels[mask] = IGNORED if annotations.crowd[number] else annotations.labels[number] + 1
        return labels
