"""Images as the network sees them and as a person does."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightspine.analysis.subject import Subject
from lightspine.data.transforms import create_eval_transform
from lightspine.errors import UsageError
from lightspine.utils.image_files import MIN_SIDE, list_image_files, open_image

MOST_PIXELS = 512 * 512
"""An image taken at its native size is reduced to at most so many pixels, so that memory is bounded."""

ImageLike = str | Path | Image.Image

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
        name: the file's name without its suffix, or "image".
        pixels: what the network takes, (1, 3, H, W), float32.
        shown: the same pixels for the eye, (H, W, 3), uint8.
        note: what was done to fit the image, such as "640x480 px seen as 224x224".
    """

    name: str
    pixels: Tensor
    shown: np.ndarray
    note: str

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels of what the network sees."""
        return int(self.pixels.shape[2]), int(self.pixels.shape[3])


def read_picture(subject: Subject, image: ImageLike) -> Picture:
    """Open an image and prepare it as the evaluation does, at the subject's size.

    An image of more than `MOST_PIXELS` taken at its native size is reduced, and the log says so.

    Args:
        subject: whose preprocessing it is.
        image: an image file, or an image that is open already.

    Raises:
        UsageError: no such file, or an image of less than 32 px on a side.
        LightspineError: the file cannot be read.
    """
    if isinstance(image, Image.Image):
        name, opened = "image", image.convert("RGB")
    else:
        name, opened = Path(image).stem, open_image(image)
    preprocessing = subject.preprocessing
    width, height = opened.size
    if subject.native:
        # The whole image: nothing is cut off.
        side = bounded_size(height, width)
        preprocessing = replace(preprocessing, input_size=(3, *side), crop_pct=1.0, crop_mode="squash")
        if side != (height, width):
            _LOG.info(
                "%s: %dx%d px are too many to look into, reduced to %dx%d", name, width, height, *side[::-1]
            )
    pixels: Tensor = create_eval_transform(preprocessing)(opened)
    seen = f"{pixels.shape[2]}x{pixels.shape[1]}"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    shown = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Picture(name, pixels[None].to(subject.device), shown, f"{width}x{height} px seen as {seen}")


def bounded_size(height: int, width: int, most: int = MOST_PIXELS) -> tuple[int, int]:
    """Return a size of at most `most` pixels and about the same ratio; a small enough one as it is."""
    if height * width <= most:
        return height, width
    scale = (most / (height * width)) ** 0.5
    # A very long image keeps the least side that networks take; the other side pays for it.
    short = max(MIN_SIDE, int(min(height, width) * scale))
    long = min(int(max(height, width) * scale), most // short)
    return (short, long) if height <= width else (long, short)


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return image files, folders replaced by the images in and below them, sorted within each folder.

    Raises:
        UsageError: nothing was given, or a folder holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = list_image_files(path) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"expected images in {path}, found none")
        files += found
    if not files:
        raise UsageError("expected at least one image or folder of images, got none")
    return files
