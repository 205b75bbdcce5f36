"""Where the images of a tar file begin and end, so that any of them can be read without the others."""

import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from lightspine.data.image_folder import EXTENSIONS
from lightspine.data.packed import PackedTexts
from lightspine.errors import LightspineError, UsageError

INDEX_SUFFIX = ".index.npz"

_FORMAT = 1
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
# A label is a number, a name or a short record; a larger member is something else.
_MAX_LABEL_BYTES = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard in the order of the file.

    Attributes:
        names: the member's name, such as "000123.jpg".
        labels: the class as written, "" where the shard has none.
        offsets: first byte in the shard; (images,), int64.
        sizes: in bytes; (images,), int64.
    """

    names: PackedTexts
    labels: PackedTexts
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)


def read_shard_index(shard: Path, *, label_key: str = "label", folder: Path | None = None) -> ShardIndex:
    """Return the index of a shard; it is made at the first use and kept.

    Args:
        shard: an uncompressed tar file of samples as WebDataset writes them: neighbouring members with the
            same name up to the first dot, one an image, one `cls` (text) or `json` (a record).
        label_key: the entry of a `json` record that holds the class.
        folder: where the index is kept; beside the shard without it. It is made anew when the shard changes.

    Raises:
        UsageError: the shard is missing, compressed or holds no image.
        LightspineError: the shard is damaged, or a label cannot be read.
    """
    if not shard.is_file():
        raise UsageError(f"expected a shard, but {shard} is not a file")
    kept = (folder or shard.parent) / f"{shard.name}{INDEX_SUFFIX}"
    status = shard.stat()
    stamp = json.dumps([_FORMAT, label_key, status.st_size, status.st_mtime_ns])
    found = _load(kept, stamp)
    if found is None:
        found = _scan(shard, label_key)
        _save(kept, found, stamp)
    if len(found) == 0:
        raise UsageError(f"expected images in the shard {shard}, which has none")
    return found


def _scan(shard: Path, label_key: str) -> ShardIndex:
    with shard.open("rb") as file:
        if kind := _COMPRESSED.get(file.read(2)):
            raise UsageError(f"expected an uncompressed tar file, but {shard} is compressed with {kind}")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                samples = list(_samples(archive, file, shard, label_key))
                # tarfile takes a file that ends inside a header for a whole one: look for the end's mark.
                file.seek(archive.offset)
                whole = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
        except (tarfile.TarError, OSError) as error:
            raise LightspineError(f"cannot read the shard {shard}: {error}") from error
    if not whole:
        raise LightspineError(f"cannot read the shard {shard}: it is cut off")
    return ShardIndex(
        PackedTexts.pack(member.name for member, _ in samples),
        PackedTexts.pack(label for _, label in samples),
        np.array([member.offset_data for member, _ in samples], dtype=np.int64),
        np.array([member.size for member, _ in samples], dtype=np.int64),
    )


def _samples(
    archive: tarfile.TarFile, file: BinaryIO, shard: Path, label_key: str
) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the image and the label of every sample."""
    key, image, label = "", None, ""
    for member in archive:
        # Links, devices and sparse files have no place in a shard; nothing is ever extracted.
        if not member.isreg() or member.sparse is not None:
            continue
        stem, _, suffix = os.path.basename(member.name).partition(".")
        here = os.path.join(os.path.dirname(member.name), stem)
        if here != key:
            if image is not None:
                yield image, label
            key, image, label = here, None, ""
        kind = suffix.lower().rpartition(".")[2]
        if f".{kind}" in EXTENSIONS:
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
        record = {label_key: text} if kind == "cls" else json.loads(text)
    except ValueError as error:
        raise LightspineError(f"cannot read the label {shard}/{member.name}: {error}") from error
    value = record.get(label_key, "") if isinstance(record, dict) else ""
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise LightspineError(
            f"expected a number or a name as {label_key} of {shard}/{member.name}, got {value}"
        )
    return str(value)


def _load(path: Path, stamp: str) -> ShardIndex | None:
    """Return a kept index, or None where there is none of this state of the shard."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            if str(kept["stamp"]) != stamp:
                return None
            names, labels = (
                PackedTexts(kept[f"{kind}_data"], kept[f"{kind}_ends"]) for kind in ("name", "label")
            )
            return ShardIndex(names, labels, kept["offsets"], kept["sizes"])
    except FileNotFoundError:
        return None
    # A file that another program cut off or wrote: numpy and zipfile raise many things on it.
    except Exception as error:
        _log.warning("the index %s is damaged (%s) and is made anew", path, error)
        return None


def _save(path: Path, index: ShardIndex, stamp: str) -> None:
    """Write an index so that several processes may do so at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}", delete=False) as file:
            np.savez(
                cast(BinaryIO, file),
                stamp=np.array(stamp),
                name_data=index.names.data,
                name_ends=index.names.ends,
                label_data=index.labels.data,
                label_ends=index.labels.ends,
                offsets=index.offsets,
                sizes=index.sizes,
            )
        os.replace(file.name, path)
    except OSError as error:
        _log.warning("the index of a shard cannot be kept in %s (%s) and is made at every start", path, error)
