"""A folder of images, one sub-folder per class."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightspine.data.images import open_image
from lightspine.errors import LightspineError, UsageError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VAL_NAMES = ("val", "validation", "valid", "test")


class Sample(NamedTuple):
    """One image file and the index of its class."""

    path: Path
    label: int


class BadImage(NamedTuple):
    """An image that was skipped, and the sentence that says why."""

    path: str
    reason: str


class Item(NamedTuple):
    """What the dataset gives for one index; no image where none could be read."""

    image: Tensor | None
    label: int
    bad: tuple[BadImage, ...]


class Batch(NamedTuple):
    """A batch of N images.

    Attributes:
        images: (N, 3, H, W), float32; N may be 0 in an evaluation where every image of the batch was bad.
        labels: (N,), int64.
        bad: the images that were skipped on the way; worker processes report through it.
    """

    images: Tensor
    labels: Tensor
    bad: list[BadImage]


@dataclass(frozen=True)
class FolderSplits:
    """The files of an image folder, split for training and validation."""

    class_names: list[str]
    train: list[Sample]
    val: list[Sample]


def scan_image_folder(root: str | Path, *, val_fraction: float = 0.2, seed: int = 0) -> FolderSplits:
    """List the images of `root/train/CLASS` and `root/val/CLASS`, or split `root/CLASS`.

    "validation", "valid" and "test" stand for "val" too. Without such a folder a share of every class, chosen
    by `seed`, is held out of `root/train/CLASS` or `root/CLASS`.

    Args:
        root: the folder.
        val_fraction: share of every class that is held out, between 0 and 1; at least one image per class.
        seed: which images are held out.

    Raises:
        UsageError: the folder is missing or has fewer than two class folders, a class has no
            image, too few for a split, or is only in the validation folder.
    """
    root = Path(root)
    train_root = root / "train" if (root / "train").is_dir() else root
    class_names, train = list_images(train_root)
    if len(class_names) < 2:
        raise UsageError(f"expected at least two class folders in {train_root}, found only {class_names[0]}")
    val_root = next(
        (root / name for name in VAL_NAMES if train_root != root and (root / name).is_dir()), None
    )
    if val_root is None:
        return FolderSplits(class_names, *_hold_out(class_names, train, val_fraction, seed))
    val_names = list_images(val_root)[0]
    if unknown := sorted(set(val_names) - set(class_names)):
        raise UsageError(f"class {unknown[0]} is in {val_root} but not in {train_root}")
    return FolderSplits(class_names, train, list_images(val_root, class_names)[1])


def list_images(root: str | Path, class_names: Sequence[str] | None = None) -> tuple[list[str], list[Sample]]:
    """Return the class names of a folder `root/CLASS/*`, sorted, and its images.

    Args:
        root: the folder; images may lie in folders below the class folder.
        class_names: number the classes by this list instead of by the folder's own names.

    Raises:
        UsageError: the folder is missing or has no class folder, a class has no image or is not in
            `class_names`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(
            f"expected a folder of images, but {root} {'is a file' if root.exists() else 'is missing'}"
        )
    found = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not found:
        raise UsageError(f"expected a folder with one sub-folder per class, but {root} has no sub-folder")
    names = list(class_names) if class_names is not None else found
    numbers = {name: number for number, name in enumerate(names)}
    samples = []
    for name in found:
        if name not in numbers:
            raise UsageError(f"class {name} of {root} is not among the model's {len(names)} classes")
        files = _image_files(root / name)
        if not files:
            raise UsageError(f"class {name} of {root} has no image")
        samples += [Sample(file, numbers[name]) for file in files]
    return names, samples


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
    )


def _hold_out(
    class_names: list[str], samples: list[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    if not 0 < fraction < 1:
        raise UsageError(f"expected a val_fraction between 0 and 1, got {fraction}")
    rng = np.random.default_rng(seed)
    train: list[Sample] = []
    val: list[Sample] = []
    for label, name in enumerate(class_names):
        members = [sample for sample in samples if sample.label == label]
        if len(members) < 2:
            raise UsageError(
                f"class {name} has one image, at least two are needed to hold one out for validation"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out = set(rng.permutation(len(members))[:count].tolist())
        train += [sample for i, sample in enumerate(members) if i not in held_out]
        val += [sample for i, sample in enumerate(members) if i in held_out]
    return train, val


class ImageFolderDataset(Dataset[Item]):
    """Reads image files; a bad one is reported with the item and never raises.

    Args:
        samples: the files and their classes.
        transform: turns a PIL RGB image into a (3, H, W) tensor.
        replace_bad: give the next readable image in place of a bad one, so that training batches keep their
            size; without it the item has no image, so that an evaluation counts no image twice.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Image.Image], Tensor],
        *,
        replace_bad: bool = False,
    ) -> None:
        self.samples = list(samples)
        self.transform = transform
        self.replace_bad = replace_bad
        # Known to this process only: saves reading a bad file again while a replacement is sought.
        self._known_bad: dict[int, BadImage] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        bad: list[BadImage] = []
        for offset in range(len(self) if self.replace_bad else 1):
            position = (index + offset) % len(self)
            path, label = self.samples[position]
            if position not in self._known_bad:
                try:
                    return Item(self.transform(open_image(path)), label, tuple(bad))
                except LightspineError as error:
                    self._known_bad[position] = BadImage(str(path), str(error))
            bad.append(self._known_bad[position])
        return Item(None, -1, tuple(bad))


def collate_images(items: Sequence[Item]) -> Batch:
    """Stack the items that have an image, and gather what was skipped."""
    images = [item.image for item in items if item.image is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor([item.label for item in items if item.image is not None], dtype=torch.int64),
        [bad for item in items for bad in item.bad],
    )
