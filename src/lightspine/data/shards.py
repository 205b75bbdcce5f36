"""Images in tar files, as WebDataset writes them, read in any order."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lightspine.data.images import decode_image
from lightspine.data.shard_index import ShardIndex, read_shard_index
from lightspine.errors import LightspineError, UsageError

MAX_IMAGE_BYTES = 1 << 28
"""A larger member of a shard, 256 MiB, is a bad image: it is not read into memory."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)$")


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the paths that a pattern stands for.

    Args:
        shards: a path, a pattern with `{000..012}` or `{a,b}` in it, a folder (its `.tar` files, sorted), or
            several of them.

    Raises:
        UsageError: a shard is missing, a folder has none, or braces hold neither a range nor a list.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    paths: list[Path] = []
    for pattern in patterns:
        for path in map(Path, _expand_braces(str(pattern))):
            if path.is_dir():
                inside = sorted(path.glob("*.tar"))
                if not inside:
                    raise UsageError(f"expected .tar files in {path}, which has none")
                paths += inside
            elif path.is_file():
                paths.append(path)
            else:
                raise UsageError(f"expected a shard, but {path} does not exist")
    if not paths:
        raise UsageError("expected at least one shard, got none")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    """Return every text that a pattern with braces stands for, in order."""
    parts = _BRACES.split(pattern)
    # The split leaves plain text at even places and what was in braces at odd ones.
    choices = [[part] if place % 2 == 0 else _choices(part, pattern) for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    if found := _RANGE.match(inside):
        first, last = found.groups()
        if int(first) > int(last):
            raise UsageError(f"expected a rising range in the pattern {pattern}, got {{{inside}}}")
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise UsageError(
        f"expected a range such as {{000..012}} or a list in the pattern {pattern}, got {{{inside}}}"
    )


class ShardSource:
    """The images of tar files; any image is read by itself, so an epoch can be shuffled and resumed exactly.

    Every image is read by seeking to it: fast on a local disk and in the page cache. Nothing is extracted.

    Args:
        shards: see `expand_shards`.
        label_key: the entry of a `json` member that holds the class.
        index_folder: where the indices are kept; beside the shards without it.

    Attributes:
        labels: the class numbers, to be set from `written_labels`; -1 before.

    Raises:
        UsageError: what `expand_shards` and `read_shard_index` refuse.
        LightspineError: a shard is damaged.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        label_key: str = "label",
        index_folder: str | Path | None = None,
    ) -> None:
        self.shards = expand_shards(shards)
        folder = None if index_folder is None else Path(index_folder)
        self._indices: list[ShardIndex] = [
            read_shard_index(shard, label_key=label_key, folder=folder) for shard in self.shards
        ]
        self._ends = np.cumsum([len(index) for index in self._indices])
        self.labels: np.ndarray | Sequence[int] = np.full(int(self._ends[-1]), -1, dtype=np.int64)

    def written_labels(self) -> list[str]:
        """Return the class of every image as it stands in the shards.

        Raises:
            UsageError: an image has none.
        """
        labels = [label for index in self._indices for label in index.labels]
        if "" in labels:
            raise UsageError(
                "expected a class with every image, in a cls or json member, but "
                f"{self.name(labels.index(''))} has none"
            )
        return labels

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, position: int) -> str:
        """Return the shard and the member, such as "train-000.tar/000123.jpg"."""
        shard, place = self._find(position)
        return f"{self.shards[shard]}/{self._indices[shard].names[place]}"

    def open(self, position: int) -> Image.Image:
        """Return an image as 8-bit RGB.

        Raises:
            UsageError: the image is smaller than 32 px on a side.
            LightspineError: it cannot be read or has more than 256 MiB.
        """
        shard, place = self._find(position)
        index = self._indices[shard]
        size = int(index.sizes[place])
        name = self.name(position)
        if size > MAX_IMAGE_BYTES:
            raise LightspineError(f"cannot read image {name}: it has {size} bytes")
        try:
            # Opened for each image: open files and their positions must not be shared by worker processes.
            with self.shards[shard].open("rb") as file:
                file.seek(int(index.offsets[place]))
                data = file.read(size)
        except OSError as error:
            raise LightspineError(f"cannot read image {name}: {error.strerror or error}") from error
        return decode_image(data, name)

    def _find(self, position: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, position - (int(self._ends[shard - 1]) if shard else 0)
