"""Image sources of batch inference: listings, shards and data loaders."""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from lightspine.data.shards import ShardSource
from lightspine.errors import UsageError
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
