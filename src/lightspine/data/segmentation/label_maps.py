"""Label maps: image files whose pixel values are classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import open_upright

IGNORED = 255
"""Ignore index: value of unlabeled pixels in the output of the readers and, by default, in files."""

MAX_CLASSES = IGNORED
"""Largest number of classes: label maps have one byte per pixel, and one value is the ignore index."""

_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I")


class LabelMapSource(Protocol):
    """Interface of objects that read label maps by name."""

    def read(self, path: str) -> np.ndarray:
        """Return the labels, (height, width), uint8; 255 is ignored.

        Raises:
            LightspineError: the label map cannot be read.
        """


class LabelReader:
    """Read label map images as class indices from 0, with 255 for ignored pixels.

    Args:
        num_classes: number of classes, at most 255.
        ignored: value of unlabeled pixels in the files, unless `remap` contains it; `None` if there is none.
        remap: value in the file -> class index, or 255 to ignore it; other values are an error. Default: the
            values are the class indices.

    Raises:
        UsageError: a number of classes or class index out of range.
    """

    def __init__(
        self, num_classes: int, *, ignored: int | None = IGNORED, remap: Mapping[int, int] | None = None
    ) -> None:
        if not 1 <= num_classes <= MAX_CLASSES:
            raise UsageError(f"expected 1 to {MAX_CLASSES} classes, got {num_classes}")
        classes = {number: number for number in range(num_classes)} if remap is None else dict(remap)
        for value, number in classes.items():
            if not 0 <= value < 2**16 or not (0 <= number < num_classes or number == IGNORED):
                raise UsageError(
                    f"expected values from 0 to 65535 mapped to classes from 0 to {num_classes - 1} or "
                    f"{IGNORED}, got {value} -> {number}"
                )
        if ignored is not None:
            classes.setdefault(ignored, IGNORED)
        self.num_classes = num_classes
        self._known = np.zeros(2**16, dtype=bool)
        self._classes = np.zeros(2**16, dtype=np.uint8)
        for value, number in classes.items():
            self._known[value], self._classes[value] = True, number

    def read(self, path: str | Path) -> np.ndarray:
        """Read a label map, (height, width), uint8, upright like its image (EXIF orientation).

        Raises:
            LightspineError: it cannot be read, is a color image, or has a value that is not a class.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise LightspineError(f"cannot read labels {path}: {error.strerror or error}") from error
        with open_upright(data, f"labels {path}") as image:
            mode, values = image.mode, np.asarray(image)
        if mode not in _MODES:
            raise LightspineError(
                f"expected one value per pixel in labels {path}, got an image of mode {mode}"
            )
        values = values.astype(np.int64)
        if values.min() < 0 or values.max() >= 2**16 or not self._known[values].all():
            raise LightspineError(f"labels {path} hold {self._first_unknown(values)}")
        return np.asarray(self._classes[values])

    def _first_unknown(self, values: np.ndarray) -> str:
        found = np.unique(values)
        unknown = [value for value in found.tolist() if not 0 <= value < 2**16 or not self._known[value]]
        known = np.flatnonzero(self._known).tolist()
        return f"the value {unknown[0]}, expected {_format_ranges(known)}"


def _format_ranges(values: list[int]) -> str:
    """Format sorted numbers as ranges: "0 to 149 or 255"."""
    known = set(values)
    starts = [value for value in values if value - 1 not in known]
    ends = [value for value in values if value + 1 not in known]
    return " or ".join(
        f"{start} to {end}" if end > start else str(start) for start, end in zip(starts, ends, strict=True)
    )
