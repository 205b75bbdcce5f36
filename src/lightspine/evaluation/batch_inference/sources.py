"""Image sources of batch inference: listings, shards and data loaders."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightspine.data.shards import ShardSource
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_write
from lightspine.utils.image_files import is_image_file, open_image, walk_image_files
from lightspine.utils.packed_strings import PackedStrings

_NAMES, _ENDS = "names.bin", "ends.bin"


class ListedFolder:
    """The images below a folder, from a listing on the disk that all processes share.

    Args:
        root: the folder.
        listing: where `write_listing` wrote.
    """

    def __init__(self, root: str | Path, listing: Path) -> None:
        self.root = Path(root)
        self.paths = PackedStrings(
            np.memmap(listing / _NAMES, dtype=np.uint8, mode="r"),
            np.memmap(listing / _ENDS, dtype=np.int64, mode="r"),
        )

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        """Return the path of an image relative to the folder."""
        return self.paths[position]

    def open(self, position: int) -> Image.Image:
        """Return an image as 8-bit RGB; raises as `open_image` does."""
        return open_image(self.root / self.paths[position])


def write_listing(root: Path, listing: Path) -> None:
    """Write the paths of all images below a folder, hidden ones left out, folder by folder, sorted.

    Never holds more than one folder's names in memory.

    Raises:
        UsageError: the folder is missing or has no image.
        LightspineError: the listing cannot be written.
    """
    if not root.is_dir():
        raise UsageError(f"expected a folder of images or shards, but {root} is not a folder")
    end = 0
    with atomic_write(listing / _NAMES) as names, atomic_write(listing / _ENDS) as ends:
        for name in walk_image_files(root):
            encoded = os.fsencode(name)
            end += len(encoded)
            names.write(encoded)
            ends.write(np.int64(end).tobytes())
        if end == 0:
            raise UsageError(f"expected a folder of images or shards, but {root} has none")


def open_images(data: str, listing: Path) -> ListedFolder | ShardSource:
    """Return the images of a folder, whose listing is written if there is none, or of shards."""
    if is_shards(data):
        return ShardSource(data)
    if not (listing / _ENDS).is_file():
        write_listing(Path(data), listing)
    return ListedFolder(data, listing)


def hash_names(images: ListedFolder | ShardSource) -> str:
    """Return the SHA-256 of the images' names in order, one per line."""
    digest = hashlib.sha256()
    for position in range(len(images)):
        digest.update(os.fsencode(images.name(position)) + b"\n")
    return digest.hexdigest()


def is_shards(data: str | Path) -> bool:
    """Return whether data are tar files: one, a pattern of them, or a folder with them and no other data."""
    path = Path(data)
    if not path.is_dir():
        return path.suffix == ".tar"
    with os.scandir(path) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    tars = [entry for entry in seen if entry.name.endswith(".tar")]
    return bool(tars) and not any(entry.is_dir() or is_image_file(entry.name) for entry in seen)


class StreamItem(NamedTuple):
    """One image at its place, or the sentence that says why there is none."""

    position: int
    image: Tensor | None
    reason: str = ""


class StreamBatch(NamedTuple):
    """The readable images of neighbouring places.

    Attributes:
        positions: the place of every image.
        images: (N, 3, H, W), float32; N may be 0.
        bad: place and reason of those that could not be read.
        end: the place behind the last.
    """

    positions: list[int]
    images: Tensor
    bad: list[tuple[int, str]]
    end: int


def stream_batches(
    images: Any,
    transform: Callable[[Image.Image], Tensor],
    ranges: Sequence[range],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Return a loader of `StreamBatch`es that reads ranges of places in order; no batch reaches over two.

    A range gives the same batches whatever was read before it, so that a resumed run rounds alike.

    Args:
        images: gives an image by its place: `ListedFolder` or `ShardSource`.
        transform: turns a PIL RGB image into a (3, H, W) tensor.
        ranges: the places to read.
        batch_size: most images of a batch.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: see PyTorch's data loader.
    """
    return DataLoader(
        _Stream(images, transform),
        batch_sampler=_Batches(ranges, batch_size),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
    )


class _Stream(Dataset[StreamItem]):
    def __init__(self, images: Any, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, position: int) -> StreamItem:
        try:
            image = self.images.open(position)
        except LightspineError as error:
            return StreamItem(position, None, str(error))
        return StreamItem(position, self.transform(image))


class _Batches:
    def __init__(self, ranges: Sequence[range], batch_size: int) -> None:
        self.ranges = ranges
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for places in self.ranges:
            for start in range(0, len(places), self.batch_size):
                yield list(places[start : start + self.batch_size])

    def __len__(self) -> int:
        return sum(-(-len(places) // self.batch_size) for places in self.ranges)


def _collate(items: Sequence[StreamItem]) -> StreamBatch:
    read = [item for item in items if item.image is not None]
    tensors = [item.image for item in read if item.image is not None]
    return StreamBatch(
        [item.position for item in read],
        torch.stack(tensors) if tensors else torch.empty(0),
        [(item.position, item.reason) for item in items if item.image is None],
        items[-1].position + 1,
    )
