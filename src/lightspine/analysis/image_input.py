"""Input images of an analysis: preprocessed for the model, and as 8-bit RGB for figures."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightspine.analysis.model_handle import ModelHandle
from lightspine.data.transforms import create_eval_transform
from lightspine.utils.image_files import MIN_SIDE, open_image

MAX_PIXELS = 512 * 512
"""Maximum number of pixels of an image at its native size; larger images are reduced to bound memory."""

ImageLike = str | Path | Image.Image

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageInput:
    """A preprocessed image.

    Attributes:
        name: name of the file without its suffix, or "image".
        pixels: input of the model, (1, 3, H, W), float32, normalized.
        display: the same pixels, (H, W, 3), uint8.
        note: original and preprocessed size, for example "640x480 px seen as 224x224".
    """

    name: str
    pixels: Tensor
    display: np.ndarray
    note: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        return int(self.pixels.shape[2]), int(self.pixels.shape[3])


def read_image(handle: ModelHandle, image: ImageLike) -> ImageInput:
    """Load an image with the evaluation preprocessing of a model.

    At native size, an image of more than `MAX_PIXELS` is reduced and a message is logged.

    Args:
        handle: the model.
        image: an image file, or an open image.

    Raises:
        UsageError: the file does not exist, or the image is smaller than 32 px on a side.
        LightspineError: the file cannot be read.
    """
    if isinstance(image, Image.Image):
        name, opened = "image", image.convert("RGB")
    else:
        name, opened = Path(image).stem, open_image(image)
    preprocessing = handle.preprocessing
    width, height = opened.size
    if handle.native:
        # Resize the whole image, without a crop.
        side = bounded_size(height, width)
        preprocessing = replace(preprocessing, input_size=(3, *side), crop_pct=1.0, crop_mode="squash")
        if side != (height, width):
            _LOG.info(
                "%s: reduced from %dx%d px to %dx%d px to bound memory", name, width, height, *side[::-1]
            )
    pixels: Tensor = create_eval_transform(preprocessing)(opened)
    seen = f"{pixels.shape[2]}x{pixels.shape[1]}"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    display = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return ImageInput(name, pixels[None].to(handle.device), display, f"{width}x{height} px seen as {seen}")


def bounded_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return a size of at most `max_pixels` with about the same aspect ratio."""
    if height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    # The shorter side of a very long image must not fall below the minimum of the models.
    short = max(MIN_SIDE, int(min(height, width) * scale))
    long = min(int(max(height, width) * scale), max_pixels // short)
    return (short, long) if height <= width else (long, short)
