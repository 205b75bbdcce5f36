"""Classification dataset: image sources, items and batches."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightspine.data.bad_images import BadImage, BadImageTolerantDataset, ItemT


class Item(NamedTuple):
    """One image with its class; `image` is `None` if it could not be read."""

    image: Tensor | None
    label: int
    bad: tuple[BadImage, ...] = ()


class Batch(NamedTuple):
    """Batch of N images.

    Attributes:
        images: (N, 3, H, W), float32; N may be 0 in evaluation if every image of the batch was bad.
        labels: (N,), int64.
        bad: images that were skipped, as reported by the worker processes.
    """

    images: Tensor
    labels: Tensor
    bad: list[BadImage]


def collate_images(items: Sequence[Item]) -> Batch:
    """Collate items into a batch; items without an image are left out."""
    images = [item.image for item in items if item.image is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([item.label for item in items if item.image is not None], dtype=torch.int64),
        [bad for item in items for bad in item.bad],
    )


class ImageSource(Protocol):
    """Random access to labeled images: files, members of tar shards or rows of a table."""

    @property
    def labels(self) -> np.ndarray | Sequence[int]:
        """Class index of every image."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """Return the name of an image in messages, such as its path."""

    def open(self, position: int) -> Image.Image:
        """Read an image as 8-bit RGB.

        Raises:
            LightspineError: it cannot be read or is too small.
        """


class EncodedImageSource(ImageSource, Protocol):
    """Random access to labeled images and to the content of their files."""

    def read(self, position: int) -> bytes:
        """Read the encoded bytes of an image.

        Raises:
            LightspineError: it cannot be read.
        """


class SourceDataset(BadImageTolerantDataset[ItemT]):
    """Map-style dataset over an image source.

    Args:
        source: the images.
        replace_bad: see `BadImageTolerantDataset`.
    """

    def __init__(self, source: ImageSource, *, replace_bad: bool) -> None:
        super().__init__(replace_bad=replace_bad)
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def image_name(self, position: int) -> str:
        """Return the name that the source gives an image."""
        return self.source.name(position)


class ImageDataset(SourceDataset[Item]):
    """Image classification dataset: transformed images and class indices from an image source.

    Args:
        source: the images.
        transform: maps a PIL RGB image to a (3, H, W) tensor.
        replace_bad: see `BadImageTolerantDataset`.
    """

    def __init__(
        self, source: ImageSource, transform: Callable[[Image.Image], Tensor], *, replace_bad: bool = False
    ) -> None:
        super().__init__(source, replace_bad=replace_bad)
        self.transform = transform

    def read(self, position: int) -> Image.Image:
        """Read an image; see `ImageSource.open`."""
        return self.source.open(position)

    def make_item(self, position: int, content: Image.Image | None, bad: tuple[BadImage, ...]) -> Item:
        """Transform an image."""
        if content is None:
            return Item(None, -1, bad)
        return Item(self.transform(content), int(self.source.labels[position]), bad)
