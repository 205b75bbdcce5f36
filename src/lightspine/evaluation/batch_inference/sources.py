"""Image sources of batch inference: shards, or a folder listed once at the start of a run."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightspine.data.dataset import ImageDataset, Item, collate_images
from lightspine.data.loader import WatchedLoader
from lightspine.data.shards import ShardSource
from lightspine.errors import UsageError
from lightspine.utils.files import atomic_write
from lightspine.utils.image_files import ImageListing, is_folder, is_image_file, is_visible_folder, open_image
from lightspine.utils.packed_strings import PackedStrings, encode_string

_NAMES, _ENDS = "names.bin", "ends.bin"


class ListedFolder:
    """Image source for a folder, with a memory-mapped listing that all ranks share.

    Args:
        root: the folder.
        listing: folder of the files written by `write_listing`.
    """

    def __init__(self, root: str | Path, listing: Path) -> None:
        self.root = Path(root)
        self.paths = PackedStrings(
            np.memmap(listing / _NAMES, dtype=np.uint8, mode="r"),
            np.memmap(listing / _ENDS, dtype=np.int64, mode="r"),
        )
        self.labels: Sequence[int] = range(len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        """Return the path of an image relative to the folder."""
        return self.paths[position]

    def open(self, position: int) -> Image.Image:
        """Return an image as 8-bit RGB; raises as `open_image` does."""
        return open_image(self.root / self.paths[position])


ImageList = ListedFolder | ShardSource
"""Image source whose labels are positions, which link the rows of a batch to the image names."""


def write_listing(root: Path, listing: Path) -> None:
    """Write the sorted paths of all images below a folder; see `ImageListing`.

    Only one folder's names are in memory at a time. What was left out is logged.

    Raises:
        UsageError: the folder is missing or has no image.
        LightspineError: the listing cannot be written.
    """
    if not root.is_dir():
        raise UsageError(f"expected a folder of images or shards, but {root} is not a folder")
    end, found = 0, ImageListing(root)
    with atomic_write(listing / _NAMES) as names, atomic_write(listing / _ENDS) as ends:
        for name in found.walk(root):
            encoded = encode_string(name)
            end += len(encoded)
            names.write(encoded)
            ends.write(np.int64(end).tobytes())
        if end == 0:
            raise UsageError(f"expected a folder of images or shards, but {root} has none")
    found.report()


def open_images(data: str | Path, listing: Path) -> ImageList:
    """Open shards or a folder, writing the folder's listing if there is none."""
    if is_shards(data):
        shards = ShardSource(data)
        shards.labels = range(len(shards))
        return shards
    if not (listing / _ENDS).is_file():
        write_listing(Path(data), listing)
    return ListedFolder(data, listing)


def hash_listing(images: ImageList) -> str:
    """Return the SHA-256 of the image names in order, one per line."""
    digest = hashlib.sha256()
    for position in range(len(images)):
        digest.update(os.fsencode(images.name(position)) + b"\n")
    return digest.hexdigest()


def is_shards(data: str | Path) -> bool:
    """Return whether data is shards: a tar file, a pattern, or a folder with tar files only."""
    path = Path(data)
    if not path.is_dir():
        return path.suffix == ".tar"
    with os.scandir(path) as entries:
        visible = [entry for entry in entries if is_visible_folder(entry.name)]
    has_tars = any(entry.name.endswith(".tar") for entry in visible)
    return has_tars and not any(is_folder(entry) or is_image_file(entry.name) for entry in visible)


def create_loader(
    images: ImageList,
    transform: Callable[[Image.Image], Tensor],
    parts: Sequence[range],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Item]:
    """Create a loader that reads parts in order, with the positions of the images as labels.

    No batch spans two parts, so a resumed run has the same batches and the same rounding.

    Args:
        images: image source.
        transform: PIL RGB image to a (3, H, W) tensor.
        parts: positions of the images of each part.
        batch_size: images per batch.
        num_workers: loader processes; 0 loads in this process.
        pin_memory: see `torch.utils.data.DataLoader`.
    """
    return WatchedLoader(
        ImageDataset(images, transform),
        batch_sampler=_PartBatchSampler(parts, batch_size),
        num_workers=num_workers,
        collate_fn=collate_images,
        pin_memory=pin_memory,
    )


class _PartBatchSampler:
    def __init__(self, parts: Sequence[range], batch_size: int) -> None:
        self.parts = parts
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.parts:
            for start in range(0, len(part), self.batch_size):
                yield list(part[start : start + self.batch_size])

    def __len__(self) -> int:
        return sum(-(-len(part) // self.batch_size) for part in self.parts)
