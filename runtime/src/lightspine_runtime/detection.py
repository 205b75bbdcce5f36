"""Detections of an exported detector, resizing as in PyTorch, and drawings."""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lightspine_runtime.errors import LightspineError, UsageError

_SHORTEST_PICTURE = 640
# Largest side and number of detections that the metadata of a file may ask for.
_LARGEST_SIDE, _MOST_DETECTIONS = 8192, 100_000
_GOLDEN_RATIO = (5**0.5 - 1) / 2

_Extent = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """How an exported detector treats images and detections.

    Attributes:
        resize: shorter side and maximum longer side of the resized image, `None` for no resizing.
        rounding: "nearest" rounds sides to the nearest integer and pixels to 8-bit values, "down" rounds
            sides down and keeps the pixels.
        score_threshold: minimum score of a detection.
        nms_threshold: IoU above which a detection is suppressed by a better one of its class.
        detections_per_image: maximum number of detections.
    """

    resize: tuple[int, int] | None
    rounding: str
    score_threshold: float
    nms_threshold: float
    detections_per_image: int

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> "DetectionSettings":
        """Create an instance from the `detection` metadata of an exported file.

        Args:
            values: the metadata.
            source: name of the file for error messages.

        Raises:
            LightspineError: an entry is missing or has a wrong type.
        """
        try:
            resize = values["resize"]
            found = cls(
                resize=None if resize is None else (int(resize[0]), int(resize[1])),
                rounding=str(values["rounding"]),
                score_threshold=float(values["score_threshold"]),
                nms_threshold=float(values["nms_threshold"]),
                detections_per_image=int(values["detections_per_image"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise LightspineError(f"{source} has incomplete detection metadata: {error!r}") from error
        if (
            not all(1 <= side <= _LARGEST_SIDE for side in found.resize or ())
            or not 0 <= found.score_threshold <= 1
            or not 0 <= found.nms_threshold <= 1
            or not 1 <= found.detections_per_image <= _MOST_DETECTIONS
        ):
            raise LightspineError(f"{source} has detection metadata out of range: {found}")
        return found


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Detected objects of one image, sorted by score.

    Attributes:
        boxes: left, top, right, bottom in pixels of the image, float32 (N, 4).
        scores: from 0 to 1, float32 (N,).
        labels: class of each object, from 1, int64 (N,).
        names: name of the class of each object.
        masks: pixels of each object, bool (N, H, W); `None` for a detector without a mask head.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: list[str]
    masks: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, score: float) -> "Detections":
        """Return the objects whose score is above a threshold."""
        return self.first(int((self.scores > score).sum()))

    def first(self, count: int) -> "Detections":
        """Return the `count` objects of the highest scores."""
        return Detections(
            boxes=self.boxes[:count],
            scores=self.scores[:count],
            labels=self.labels[:count],
            names=self.names[:count],
            masks=None if self.masks is None else self.masks[:count],
        )


def resized_size(height: int, width: int, settings: DetectionSettings) -> tuple[int, int]:
    """Return the height and width to which a detector resizes an image."""
    if settings.resize is None:
        return height, width
    sides = height, width
    factor = min(settings.resize[0] / min(sides), settings.resize[1] / max(sides))
    shift = 0.5 if settings.rounding == "nearest" else 0.0
    return max(int(height * factor + shift), 1), max(int(width * factor + shift), 1)


def resize_pixels(pixels: NDArray[np.uint8], settings: DetectionSettings) -> NDArray[np.float32]:
    """Resize an image by linear interpolation without antialiasing, as PyTorch does.

    Args:
        pixels: (H, W, C).
        settings: the size and the rounding of pixels.

    Returns:
        (h, w, C), 0 to 255.
    """
    size = resized_size(pixels.shape[0], pixels.shape[1], settings)
    values = pixels.astype(np.float32)
    if size == pixels.shape[:2]:
        return values
    for axis in (0, 1):
        values = _interpolate(values, axis, size[axis])
    return values.round() if settings.rounding == "nearest" else values


def _interpolate(values: NDArray[np.float32], axis: int, count: int) -> NDArray[np.float32]:
    side = values.shape[axis]
    step = np.float32(side) / np.float32(count)
    places = np.maximum((np.arange(count, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5), 0)
    before = np.minimum(places.astype(np.int64), side - 1)
    after = np.minimum(before + 1, side - 1)
    share = (places - before).astype(np.float32)
    share = share.reshape([-1 if place == axis else 1 for place in range(values.ndim)])
    return np.take(values, before, axis) * (1 - share) + np.take(values, after, axis) * share


def resize_masks(masks: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """Resize masks (N, h, w) to (N, height, width)."""
    resized = np.zeros((len(masks), height, width), np.bool_)
    for place, mask in enumerate(masks):
        image = Image.fromarray(mask.astype(np.uint8) * 255)
        resized[place] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) >= 128
    return resized


def draw_detections(
    image: Image.Image, found: Detections, path: str | Path | None = None, *, max_drawn: int = 100
) -> Image.Image:
    """Draw detected objects: boxes with class and score and, if there are any, masks.

    Labels are placed so that they do not cover each other, as far as there is room.

    Args:
        image: 8-bit RGB; small images are enlarged in the drawing.
        found: the objects, in pixels of the image.
        path: file to write; its suffix chooses the format.
        max_drawn: maximum number of objects, those of the highest scores.

    Returns:
        The drawing.

    Raises:
        UsageError: max_drawn below 1.
        LightspineError: the file cannot be written.
    """
    if max_drawn < 1:
        raise UsageError(f"expected max_drawn of at least 1, got {max_drawn}")
    found = found.first(max_drawn)
    factor = max(1.0, _SHORTEST_PICTURE / max(image.size))
    size = round(image.width * factor), round(image.height * factor)
    picture = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    for place, mask in enumerate(found.masks if found.masks is not None else ()):
        layer = Image.fromarray(mask.astype(np.uint8) * 110).resize(size, Image.Resampling.NEAREST)
        picture.paste(Image.new("RGB", size, _color(int(found.labels[place]))), (0, 0), layer)
    draw = ImageDraw.Draw(picture)
    for place, box in enumerate(found.boxes * factor):
        color, corners = _color(int(found.labels[place])), [tuple(box[:2]), tuple(box[2:])]
        # A dark outline makes the colored one visible on any background.
        draw.rectangle([(x - 1, y - 1) for x, y in corners], outline="black", width=4)
        draw.rectangle(corners, outline=color, width=2)
    # Many labels would cover the objects.
    if len(found) <= 30:
        _draw_labels(draw, found, factor, size)
    if path is not None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        except (OSError, ValueError) as error:
            raise LightspineError(f"cannot write {path}: {error}") from error
    return picture


def _draw_labels(draw: ImageDraw.ImageDraw, found: Detections, factor: float, size: tuple[int, int]) -> None:
    """Write the labels, each where it covers as little as possible of the labels of better detections."""
    font = ImageFont.load_default(12)
    texts = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores, strict=True)]
    placed: list[_Extent] = []
    for text, box in zip(texts, (found.boxes * factor).tolist(), strict=True):
        extent = draw.textbbox((0, 0), text, font=font)
        placed.append(place_label(box, extent[2] + 4, extent[3] + 4, size, placed))
    # The best one last, so that it stays readable where there is no room.
    for text, extent, label in reversed(list(zip(texts, placed, found.labels.tolist(), strict=True))):
        draw.rectangle(extent, fill="white", outline=_color(label))
        draw.text((extent[0] + 2, extent[1] + 1), text, fill="black", font=font)


def place_label(
    box: Sequence[float], width: float, height: float, size: tuple[int, int], placed: Sequence[_Extent]
) -> _Extent:
    """Return the place of a label at its box that covers as little as possible of other labels.

    Args:
        box: left, top, right, bottom of the object.
        width: width of the label.
        height: height of the label.
        size: width and height of the picture, which the label does not leave.
        placed: the labels placed so far.

    Returns:
        Left, top, right, bottom of the label.
    """
    left, top, right, bottom = box
    places = [
        (min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0)))
        for y in (top - height, top, bottom, bottom - height, (top + bottom - height) / 2)
        for x in (left, right - width)
    ]
    extents = [(x, y, x + width, y + height) for x, y in places]
    return min(extents, key=lambda extent: sum(_shared_area(extent, other) for other in placed))


def _shared_area(one: _Extent, other: _Extent) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _color(label: int) -> tuple[int, int, int]:
    """Return the color of a class; steps of the golden ratio spread the hues of any number of classes."""
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN_RATIO % 1, 0.6, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
