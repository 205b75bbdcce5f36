"""From an image to the array that a model takes, as the evaluation of the training library prepares it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightspine_runtime.errors import LightspineError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How an image becomes the input of a model.

    Attributes:
        size: (height, width) in pixels.
        mean: per channel, of values from 0 to 1.
        std: per channel, of values from 0 to 1.
        interpolation: Pillow's name of the resampling filter.
        crop_pct: side of the central crop as a share of the resized image.
        crop_mode: "center" (the shorter side fits, the rest is cut off), "squash" (both sides fit, the ratio
            is lost) or "border" (the longer side fits, the rest is filled with the mean).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> "Preparation":
        """Read the entries that an exported file has.

        Raises:
            LightspineError: one is missing or unknown; the message names the source.
        """
        try:
            found = cls(
                size=(int(values["input_size"][1]), int(values["input_size"][2])),
                mean=tuple(map(float, values["mean"])),
                std=tuple(map(float, values["std"])),
                interpolation=str(values["interpolation"]),
                crop_pct=float(values.get("crop_pct") or 0.875),
                crop_mode=str(values.get("crop_mode") or "center"),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise LightspineError(f"{source} does not say how its images are prepared: {error!r}") from error
        if found.interpolation not in _FILTERS or found.crop_mode not in _CROP_MODES:
            raise LightspineError(
                f"{source} prepares images by the filter {found.interpolation!r} and the crop "
                f"{found.crop_mode!r}, expected one of {', '.join(_FILTERS)} and of {', '.join(_CROP_MODES)}"
            )
        return found


def crop_image(image: Image.Image, preparation: Preparation) -> NDArray[np.uint8]:
    """Resize and crop an RGB image to 8-bit pixels (height, width, 3)."""
    height, width = preparation.size
    scaled = math.floor(height / preparation.crop_pct), math.floor(width / preparation.crop_pct)
    size = _resized(image, scaled, preparation.crop_mode)
    if size != (image.height, image.width):
        image = image.resize((size[1], size[0]), _FILTERS[preparation.interpolation])
    # Outside the image there is black, or with a border the mean colour.
    border = preparation.crop_mode == "border"
    fill = tuple(round(255 * value) for value in preparation.mean) if border else (0, 0, 0)
    canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    left, top = round((canvas.width - width) / 2.0), round((canvas.height - height) / 2.0)
    return np.asarray(canvas.crop((left, top, left + width, top + height)))


def normalise(pixels: NDArray[np.uint8], preparation: Preparation) -> NDArray[np.float32]:
    """Map pixels (..., height, width, 3) to normalised values (..., 3, height, width)."""
    mean, std = (np.asarray(values, np.float32) for values in (preparation.mean, preparation.std))
    values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def _resized(image: Image.Image, scaled: tuple[int, int], crop_mode: str) -> tuple[int, int]:
    """Return the (height, width) that an image is resized to, rounded as the training library does."""
    if crop_mode == "squash":
        return scaled
    if crop_mode == "center" and scaled[0] == scaled[1]:
        shorter, longer = sorted((image.height, image.width))
        other = int(scaled[0] * longer / shorter)
        return (scaled[0], other) if image.height <= image.width else (other, scaled[0])
    ratios = image.height / scaled[0], image.width / scaled[1]
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    return round(image.height / ratio), round(image.width / ratio)
