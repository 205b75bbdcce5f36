"""Image preprocessing in NumPy and Pillow, equal to the evaluation transforms of lightspine and timm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightspine_runtime.errors import LightspineError, UsageError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# Largest height and width that the metadata of a file may ask for.
_LARGEST_SIDE = 4096
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Size, crop and normalization of the input images.

    Attributes:
        size: (height, width) in pixels.
        mean: mean per channel, for values from 0 to 1.
        std: standard deviation per channel, for values from 0 to 1.
        interpolation: Pillow's name of the resampling filter.
        crop_pct: side of the center crop as a fraction of the resized image.
        crop_mode: "center" (resize the shorter side, crop the longer one), "squash" (resize both sides,
            ignoring the aspect ratio) or "border" (resize the longer side, pad with the mean color).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> "Preprocessing":
        """Create an instance from the `preprocessing` metadata of an exported file.

        Args:
            values: the metadata.
            source: name of the file for error messages.

        Raises:
            LightspineError: an entry is missing or has an unknown value.
        """
        try:
            found = cls(
                size=(int(values["input_size"][1]), int(values["input_size"][2])),
                mean=_numbers(values["mean"]),
                std=_numbers(values["std"]),
                interpolation=str(values["interpolation"]),
                crop_pct=float(values.get("crop_pct") or 0.875),
                crop_mode=str(values.get("crop_mode") or "center"),
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LightspineError(f"{source} has incomplete preprocessing metadata: {error!r}") from error
        if (
            not all(1 <= side <= _LARGEST_SIDE for side in found.size)
            or not 0.05 <= found.crop_pct <= 10
            # The image is resized to the size divided by this share before it is cropped.
            or max(found.size) / found.crop_pct > 2 * _LARGEST_SIDE
            or not all(-1e3 <= value <= 1e3 for value in found.mean)
            or not all(1e-6 <= value <= 1e3 for value in found.std)
            or not len(found.mean) == len(found.std) == 3
        ):
            raise LightspineError(
                f"{source} has preprocessing metadata out of range: size {found.size}, crop_pct "
                f"{found.crop_pct}, mean {found.mean[:4]}, std {found.std[:4]}"
            )
        if found.interpolation not in _FILTERS or found.crop_mode not in _CROP_MODES:
            raise LightspineError(
                f"{source} has interpolation {found.interpolation!r} and crop_mode {found.crop_mode!r}, "
                f"expected one of {', '.join(_FILTERS)} and one of {', '.join(_CROP_MODES)}"
            )
        return found


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"expected a list, got {values!r:.80}")
    return tuple(map(float, values))


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop an RGB image; returns uint8 (H, W, 3)."""
    height, width = preprocessing.size
    scaled = math.floor(height / preprocessing.crop_pct), math.floor(width / preprocessing.crop_pct)
    size = _resized_size(image, scaled, preprocessing.crop_mode)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and size[0] * size[1] > most:
        raise UsageError(
            f"expected an image of usual proportions, got {image.width}x{image.height} px, which resized to "
            f"{size[1]}x{size[0]} px are more than {most:,} px"
        )
    if size != (image.height, image.width):
        image = image.resize((size[1], size[0]), _FILTERS[preprocessing.interpolation])
    # An image smaller than the crop is padded: with the mean color in mode "border", else with black.
    border = preprocessing.crop_mode == "border"
    fill = tuple(round(255 * value) for value in preprocessing.mean) if border else (0, 0, 0)
    canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    left, top = round((canvas.width - width) / 2.0), round((canvas.height - height) / 2.0)
    return np.asarray(canvas.crop((left, top, left + width, top + height)))


def normalize(pixels: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Normalize pixels (..., H, W, 3) from 0 to 255 to float32 (..., 3, H, W)."""
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def _resized_size(image: Image.Image, scaled: tuple[int, int], crop_mode: str) -> tuple[int, int]:
    """Return the (height, width) before the crop, rounded as torchvision and timm do."""
    if crop_mode == "squash":
        return scaled
    if crop_mode == "center" and scaled[0] == scaled[1]:
        shorter, longer = sorted((image.height, image.width))
        other = int(scaled[0] * longer / shorter)
        return (scaled[0], other) if image.height <= image.width else (other, scaled[0])
    ratios = image.height / scaled[0], image.width / scaled[1]
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    return round(image.height / ratio), round(image.width / ratio)
