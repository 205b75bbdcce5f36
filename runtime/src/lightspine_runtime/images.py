"""Image decoding to 8-bit RGB, equal to that of `lightspine.utils.image_files`."""

import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lightspine_runtime.errors import LightspineError, UsageError

MIN_SIDE = 32
"""Minimum height and width of an image in pixels."""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def open_image(path: str | Path) -> Image.Image:
    """Open an image file as 8-bit RGB in upright orientation; see `decode_image`.

    Args:
        path: an image file in a raster format that Pillow reads.

    Raises:
        UsageError: the file does not exist, or the image is smaller than 32 px on a side.
        LightspineError: the file is not an image, is truncated, or has pixels that cannot be converted.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"expected an image file, but {path} {'is a folder' if path.is_dir() else 'does not exist'}"
        )
    try:
        with path.open("rb") as file:
            return decode_image(file, str(path))
    except OSError as error:
        raise LightspineError(f"cannot read image {path}: {error.strerror or error}") from error


def decode_image(data: bytes | BinaryIO, name: str) -> Image.Image:
    """Decode an image as 8-bit RGB in upright orientation.

    Grayscale, palette, CMYK and 16-bit images are converted (16-bit values are scaled, not clipped), the
    alpha channel is dropped, and the EXIF orientation is applied.

    Args:
        data: the content of an image file, or the open file.
        name: name of the image in error messages.

    Raises:
        UsageError: the image is smaller than 32 px on a side.
        LightspineError: the data is not an image, is truncated, or has pixels that cannot be converted.
    """
    try:
        # Pillow warns about damage that it can ignore, such as a broken EXIF block.
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_formats()) as file,
        ):
            _check_effort(file)
            # A conversion may drop the EXIF block, so apply the orientation first.
            ImageOps.exif_transpose(file, in_place=True)
            image = _to_rgb(file)
    # On damaged data Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise LightspineError(f"cannot read image {name}: {reason or type(error).__name__}") from error
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise UsageError(f"image {name} is {width}x{height} px, at least {MIN_SIDE}x{MIN_SIDE} is needed")
    return image


# Scans of a progressive JPEG that may cover so many pixels in all; encoders write up to fifteen scans.
_USUAL_SCANS, _MOST_SCANNED = 16, 2**30


def _check_effort(file: Any) -> None:
    """Check the number of pixels, and that a small JPEG does not decode them thousands of times."""
    width, height = file.size
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(f"it has {width}x{height} px, more than {most:,} in all")
    if file.info.get("progressive") or file.info.get("progression"):
        at = file.fp.tell()
        file.fp.seek(0)
        scans = file.fp.read().count(b"\xff\xda")
        file.fp.seek(at)
        if scans > _USUAL_SCANS and scans * width * height > _MOST_SCANNED:
            raise ValueError(f"it decodes its {width}x{height} px {scans:,} times")


@cache
def _formats() -> tuple[str, ...]:
    """Return the raster formats that this Pillow reads; its EPS reader starts Ghostscript."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255, which turns most pixels white.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"expected integer pixels from 0 to 65535, got {values.min()} to {values.max()}")
        return Image.fromarray((values // values.dtype.type(257)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("expected integer pixels, got floating-point ones")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow drops the alpha of a palette correctly only by way of RGBA.
        image = image.convert("RGBA")
    return image.convert("RGB")
