"""WebDataset shards: images in tar files with random access through an index."""

import itertools
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_write, parse_json
from lightspine.utils.image_files import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, decode_image
from lightspine.utils.packed_strings import PackedStrings

INDEX_SUFFIX = ".index.npz"

_INDEX_FORMAT = 1
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
# A label is a number, a name or a short record.
_MAX_LABEL_BYTES = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)$")

_log = logging.getLogger(__name__)


class ShardSource:
    """Image source with random access to the members of tar files, for exact shuffling and resuming.

    Images are read in place by seeking, which is fast on a local disk and in the page cache.

    Args:
        shards: see `expand_shards`.
        label_key: key of the class in a `json` member.
        index_folder: folder for the index files; by default they are written next to the shards.

    Attributes:
        labels: class indices, to be set from `written_labels`; initially -1.

    Raises:
        UsageError: see `expand_shards` and `read_shard_index`.
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
        """Return the label of every image as written in the shards.

        Raises:
            UsageError: an image has none.
        """
        labels = [label for index in self._indices for label in index.labels]
        if "" in labels:
            raise UsageError(
                "expected a class for every image, in a cls or json member, but "
                f"{self.name(labels.index(''))} has none"
            )
        return labels

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, position: int) -> str:
        """Return the shard and the member, such as "train-000.tar/000123.jpg"."""
        shard, member = self._locate(position)
        return f"{self.shards[shard]}/{self._indices[shard].names[member]}"

    def open(self, position: int) -> Image.Image:
        """Decode an image to 8-bit RGB, as `decode_image` does."""
        return decode_image(self.read(position), self.name(position))

    def read(self, position: int) -> bytes:
        """Read the encoded bytes of an image.

        Raises:
            LightspineError: it cannot be read or is larger than 256 MiB.
        """
        shard, member = self._locate(position)
        index = self._indices[shard]
        size = int(index.sizes[member])
        name = self.name(position)
        if size > MAX_IMAGE_BYTES:
            raise LightspineError(f"cannot read image {name}: {size} bytes exceed {MAX_IMAGE_BYTES}")
        try:
            # Opened for each image, because forked workers would share the file position.
            with self.shards[shard].open("rb") as file:
                file.seek(int(index.offsets[member]))
                return file.read(size)
        except OSError as error:
            raise LightspineError(f"cannot read image {name}: {error.strerror or error}") from error

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the shard of an image and its position in the shard."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, position - (int(self._ends[shard - 1]) if shard else 0)


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """Expand shard patterns and folders to the paths of the shards.

    Args:
        shards: a path, a pattern with braces such as `{000..012}` or `{a,b}`, a folder (its `.tar` files,
            sorted), or several of them.

    Raises:
        UsageError: a shard is missing, a folder has none, or braces hold neither a range nor a list.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    paths: list[Path] = []
    for pattern in patterns:
        for path in map(Path, _expand_braces(str(pattern))):
            if path.is_dir():
                inside = sorted(
                    file for file in path.glob("*.tar") if not file.name.startswith(".") and file.is_file()
                )
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
    """Expand the braces of a pattern, in order."""
    parts = _BRACES.split(pattern)
    # The split puts plain text at even positions and the content of braces at odd ones.
    choices = [[part] if i % 2 == 0 else _brace_alternatives(part, pattern) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _brace_alternatives(inside: str, pattern: str) -> list[str]:
    if found := _RANGE.match(inside):
        first, last = found.groups()
        if int(first) > int(last):
            raise UsageError(f"expected an ascending range in the pattern {pattern}, got {{{inside}}}")
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise UsageError(
        f"expected a range such as {{000..012}} or a list in the pattern {pattern}, got {{{inside}}}"
    )


@dataclass(frozen=True)
class ShardIndex:
    """Byte ranges and labels of the images in one shard, in the order of the file.

    Attributes:
        names: member names, such as "000123.jpg".
        labels: labels as written, "" if the shard has none.
        offsets: first byte in the shard; (images,), int64.
        sizes: size in bytes; (images,), int64.
    """

    names: PackedStrings
    labels: PackedStrings
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)


def read_shard_index(shard: Path, *, label_key: str = "label", folder: Path | None = None) -> ShardIndex:
    """Load the index of a shard; it is built and saved on first use.

    Args:
        shard: uncompressed tar file of WebDataset samples: consecutive members with the same name up to the
            first dot, one an image, one `cls` (text) or `json` (a record).
        label_key: key of the class in a `json` record.
        folder: folder for the index file; next to the shard by default. A changed shard is indexed again.

    Raises:
        UsageError: the shard is missing, compressed or holds no image.
        LightspineError: the shard is damaged, or a label cannot be read.
    """
    if not shard.is_file():
        raise UsageError(f"expected a shard, but {shard} is not a file")
    index_file = (folder or shard.parent) / f"{shard.name}{INDEX_SUFFIX}"
    status = shard.stat()
    stamp = json.dumps([_INDEX_FORMAT, label_key, status.st_size, status.st_mtime_ns])
    index = _load_index(index_file, stamp, status.st_size)
    if index is None:
        index = _build_index(shard, label_key)
        _save_index(index_file, index, stamp)
    if len(index) == 0:
        raise UsageError(f"expected images in the shard {shard}, which has none")
    return index


def _build_index(shard: Path, label_key: str) -> ShardIndex:
    with shard.open("rb") as file:
        if kind := _COMPRESSION_MAGIC.get(file.read(2)):
            raise UsageError(f"expected an uncompressed tar file, but {shard} is compressed with {kind}")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                samples = list(_iterate_samples(archive, file, shard, label_key))
                # tarfile accepts a file that ends inside a header, so check for the end-of-archive block.
                file.seek(archive.offset)
                complete = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
        # tarfile raises the last three for extended headers of wrong, huge or endless content.
        except (tarfile.TarError, OSError, ValueError, RecursionError, MemoryError) as error:
            reason = str(error) or "a header is damaged"
            raise LightspineError(f"cannot read the shard {shard}: {reason}") from error
    if not complete:
        raise LightspineError(f"cannot read the shard {shard}: it is truncated")
    return ShardIndex(
        PackedStrings.pack(member.name for member, _ in samples),
        PackedStrings.pack(label for _, label in samples),
        np.array([member.offset_data for member, _ in samples], dtype=np.int64),
        np.array([member.size for member, _ in samples], dtype=np.int64),
    )


def _iterate_samples(
    archive: tarfile.TarFile, file: BinaryIO, shard: Path, label_key: str
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the image and the label of every sample."""
    key, image, label = "", None, ""
    for member in archive:
        # Links, devices and sparse files do not belong in a shard.
        if not member.isreg() or member.sparse is not None:
            continue
        stem, _, suffix = os.path.basename(member.name).partition(".")
        member_key = os.path.join(os.path.dirname(member.name), stem)
        if member_key != key:
            if image is not None:
                yield image, label
            key, image, label = member_key, None, ""
        kind = suffix.lower().rpartition(".")[2]
        if f".{kind}" in IMAGE_SUFFIXES:
            image = member
        elif kind in ("cls", "json"):
            position = file.tell()
            label = _read_label(file, member, shard, kind, label_key) or label
            file.seek(position)
    if image is not None:
        yield image, label


def _read_label(file: BinaryIO, member: tarfile.TarInfo, shard: Path, kind: str, label_key: str) -> str:
    if member.size > _MAX_LABEL_BYTES:
        raise LightspineError(f"expected a label in {shard}/{member.name}, got {member.size} bytes")
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode("utf-8").strip()
        record = {label_key: text} if kind == "cls" else parse_json(text)
    except ValueError as error:
        raise LightspineError(f"cannot read the label {shard}/{member.name}: {error}") from error
    value = record.get(label_key, "") if isinstance(record, dict) else ""
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise LightspineError(
            f"expected a number or a name as {label_key} of {shard}/{member.name}, got {value}"
        )
    return str(value)


def _load_index(path: Path, stamp: str, shard_size: int) -> ShardIndex | None:
    """Load a saved index; `None` if there is none for this version of the shard."""
    if path.exists() and not path.is_file():
        _log.warning("replacing the index %s, which is no ordinary file", path)
        return None
    try:
        _check_archive(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            if str(saved["stamp"]) != stamp:
                return None
            names, labels = (
                PackedStrings.from_arrays(saved[f"{kind}_data"], saved[f"{kind}_ends"])
                for kind in ("name", "label")
            )
            index = ShardIndex(names, labels, saved["offsets"], saved["sizes"])
            _check_index(index, shard_size)
            return index
    except FileNotFoundError:
        return None
    # NumPy and zipfile raise many types on a file that is truncated or not an index.
    except Exception as error:
        _log.warning("rebuilding the damaged index %s (%s)", path, error)
        return None


def _check_archive(path: Path) -> None:
    """Check that an index file unpacks to the size of the file, before memory is allocated for it.

    Raises:
        ValueError: it is compressed, or claims more than it has.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("it claims more bytes than it has")


def _check_index(index: ShardIndex, shard_size: int) -> None:
    """Check that an index, which may come with the shards of others, describes images in the shard.

    Raises:
        ValueError: an array has another type or length, or a byte range is not in the shard.
    """
    for array in (index.offsets, index.sizes):
        if array.dtype != np.int64 or array.shape != (len(index.names),):
            raise ValueError("its arrays have different lengths")
    if len(index.labels) != len(index.names):
        raise ValueError("its arrays have different lengths")
    # Compared without a sum, which could overflow.
    if ((index.offsets < 0) | (index.sizes < 0) | (index.sizes > shard_size - index.offsets)).any():
        raise ValueError("it has images outside the shard")


def _save_index(path: Path, index: ShardIndex, stamp: str) -> None:
    try:
        with atomic_write(path) as file:
            np.savez(
                file,
                stamp=np.array(stamp),
                name_data=index.names.data,
                name_ends=index.names.ends,
                label_data=index.labels.data,
                label_ends=index.labels.ends,
                offsets=index.offsets,
                sizes=index.sizes,
            )
    # The shards may be on a read-only disk.
    except LightspineError as error:
        _log.warning("the index of a shard cannot be saved and is rebuilt at every start: %s", error)
