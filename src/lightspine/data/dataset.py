"""From a source of images to the items of a data loader; a bad image is reported and never raises."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightspine.data.batch import BadImage, Item
from lightspine.errors import LightspineError


class ImageSource(Protocol):
    """Labelled images at positions from 0: files, members of shards, rows of a table."""

    @property
    def labels(self) -> np.ndarray | Sequence[int]:
        """The class of every image."""

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """Return what names the image to a user, such as its path."""

    def open(self, position: int) -> Image.Image:
        """Return the image as 8-bit RGB.

        Raises:
            LightspineError: it cannot be read or is too small.
        """


class ImageDataset(Dataset[Item]):
    """Reads and transforms the images of a source.

    Args:
        source: where the images come from.
        transform: turns a PIL RGB image into a (3, H, W) tensor.
        replace_bad: give the next readable image in place of a bad one, so that training batches keep their
            size; without it the item has no image, so that an evaluation counts no image twice.
    """

    def __init__(
        self, source: ImageSource, transform: Callable[[Image.Image], Tensor], *, replace_bad: bool = False
    ) -> None:
        self.source = source
        self.transform = transform
        self.replace_bad = replace_bad
        # Known to this process only: saves reading a bad image again while a replacement is sought.
        self._known_bad: dict[int, BadImage] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        # Without it a loop over the dataset would never end.
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        bad: list[BadImage] = []
        for offset in range(len(self) if self.replace_bad else 1):
            position = (index + offset) % len(self)
            if position not in self._known_bad:
                try:
                    image = self.source.open(position)
                except LightspineError as error:
                    self._known_bad[position] = BadImage(self.source.name(position), str(error))
                else:
                    return Item(self.transform(image), int(self.source.labels[position]), tuple(bad))
            bad.append(self._known_bad[position])
        return Item(None, -1, tuple(bad))
