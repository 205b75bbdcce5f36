"""Record of the images that a run trained on and held out, by hashes, so that a file remembers its split."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lightspine.errors import LightspineError

Part = Literal["train", "val", "all", "changed"]

# File sizes tell apart folders whose files have the same names (0.png, 1.png, ...).
_SIZED_FILES = 64


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """The training and validation images of a run, as hashes of their names.

    Attributes:
        train_sha256: hash of the training images, see `hash_images`.
        train_images: number of training images.
        val_sha256: hash of the validation images.
        val_images: number of validation images.
        val_fraction: share of the images that was held out of one folder; `None` if the data has splits.
        seed: seed of that split.
        all_sha256: hash of both together, if they are from one folder.
        folder_sha256: hash of the absolute path of that folder.
    """

    train_sha256: str
    train_images: int
    val_sha256: str
    val_images: int
    val_fraction: float | None = None
    seed: int | None = None
    all_sha256: str | None = None
    folder_sha256: str | None = None

    def find_part(self, images: Sequence[str]) -> Part | None:
        """Return which images of the run these are.

        Args:
            images: paths of images.

        Returns:
            "train" or "val" for the images of a split, "all" for both of one folder; "changed" for images of
            that folder if some were added or removed since; `None` for other images.
        """
        found = hash_images(images)
        parts: dict[str | None, Part] = {
            self.all_sha256: "all",
            self.train_sha256: "train",
            self.val_sha256: "val",
        }
        if found in parts:
            return parts[found]
        return "changed" if _hash_folder(images) == self.folder_sha256 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SplitRecord":
        """Return a record from its fields.

        Raises:
            LightspineError: a field is missing or unknown, or has another type.
        """
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise LightspineError(
                f"expected a record of the split with {', '.join(sorted(names))}, got {', '.join(values)}"
            )
        types = {
            "train_images": int,
            "val_images": int,
            "val_fraction": float | int | None,
            "seed": int | None,
        }
        for name, value in values.items():
            text = str if name in ("train_sha256", "val_sha256") else str | None
            if not isinstance(value, types.get(name, text)):
                raise LightspineError(f"the record of the split has the {name} {str(value)[:80]!r}")
        return cls(**values)


def record_split(
    train: Sequence[str], val: Sequence[str], *, val_fraction: float | None = None, seed: int | None = None
) -> SplitRecord:
    """Record the training and validation images of a run.

    Args:
        train: paths of the training images.
        val: paths of the validation images.
        val_fraction: share that was held out, if the data may have no splits.
        seed: seed of that split.
    """
    is_one_folder = val_fraction is not None and are_of_one_folder(train, val)
    both = [*train, *val]
    return SplitRecord(
        train_sha256=hash_images(train),
        train_images=len(train),
        val_sha256=hash_images(val),
        val_images=len(val),
        val_fraction=val_fraction if is_one_folder else None,
        seed=seed if is_one_folder else None,
        all_sha256=hash_images(both) if is_one_folder else None,
        folder_sha256=_hash_folder(both) if is_one_folder else None,
    )


def are_of_one_folder(train: Sequence[str], val: Sequence[str]) -> bool:
    """Return whether two splits were drawn from one folder, instead of having a folder each."""
    return _common_folder(train) == _common_folder(val)


def hash_images(images: Iterable[str]) -> str:
    """Return the SHA-256 of a set of images: their names within their common folder and some file sizes.

    The hash depends neither on the order nor on where the folder lies.

    Args:
        images: paths of images.
    """
    paths = sorted(images)
    folder = _common_folder(paths)
    digest = hashlib.sha256()
    step = max(len(paths) // _SIZED_FILES, 1)
    for number, path in enumerate(paths):
        name = path[len(folder) :].replace(os.sep, "/").lstrip("/")
        size = os.path.getsize(path) if number % step == 0 and os.path.isfile(path) else ""
        digest.update(f"{name}\t{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _common_folder(paths: Sequence[str]) -> str:
    # What the first and the last path in alphabetical order share is shared by all.
    return os.path.commonpath([os.path.dirname(path) for path in (min(paths), max(paths))]) if paths else ""


def _hash_folder(paths: Sequence[str]) -> str:
    folder = os.path.realpath(_common_folder(paths))
    return hashlib.sha256(os.fsencode(folder)).hexdigest()
