"""Image files: suffixes, listing and decoding to 8-bit RGB.

`lightspine_runtime` has its own copy of the decoder, because it is installed without this package.
"""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lightspine.errors import LightspineError, UsageError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes, in lower case, of the files that count as images in folders and shards."""

MIN_SIDE = 32
"""Smallest height and width of an image in pixels that the models accept."""


def is_image_file(name: str) -> bool:
    """Return whether a file name has an image suffix and is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def walk_image_files(folder: str | Path) -> Iterator[str]:
    """Yield the paths of the images in a folder and its sub-folders, relative to the folder.

    The files of a folder come in sorted order before those of its sub-folders, which are visited in sorted
    order, so only one folder's names are held in memory. Symbolic links are followed; hidden files and
    folders are left out.
    """
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(parent, folder)
        for name in sorted(filter(is_image_file, names)):
            yield name if inside == "." else f"{inside}/{name}"


def list_image_files(folder: str | Path) -> list[Path]:
    """Return the paths of the images in a folder and its sub-folders, sorted; see `walk_image_files`."""
    return sorted(Path(folder, name) for name in walk_image_files(folder))


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright; see `decode_image`.

    Args:
        path: file of any format that Pillow reads.

    Raises:
        UsageError: the file does not exist, or the image is smaller than 32 px on a side.
        LightspineError: the file is not an image, is truncated, or has pixels of an unsupported type.
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
    """Decode an image to 8-bit RGB, upright.

    Gray, palette, CMYK and 16-bit images are converted (16-bit values are scaled, not clipped), transparency
    is dropped, and the EXIF orientation is applied.

    Args:
        data: content of an image file, or the open file.
        name: name of the image in error messages.

    Raises:
        UsageError: the image is smaller than 32 px on a side.
        LightspineError: it is not an image, is truncated, or has pixels of an unsupported type.
    """
    try:
        # Pillow warns about harmless damage, such as an invalid EXIF block.
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),
            Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file,
        ):
            # A conversion may drop the EXIF block that holds the orientation, so rotate first.
            image = _convert_to_rgb(ImageOps.exif_transpose(file))
    # Pillow's decoders raise many types on damaged data: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise LightspineError(f"cannot read image {name}: {reason or type(error).__name__}") from error
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise UsageError(f"image {name} is {width}x{height} px, at least {MIN_SIDE}x{MIN_SIDE} is needed")
    return image


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255, which turns most pixels white.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"expected integer pixels from 0 to 65535, got {values.min()} to {values.max()}")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("expected integer pixels, got floating-point ones")
    if image.mode == "P" and "transparency" in image.info:
        # A palette with an alpha value per color must become RGBA before alpha can be dropped.
        image = image.convert("RGBA")
    return image.convert("RGB")
