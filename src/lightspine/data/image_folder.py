"""A folder of images, one sub-folder per class."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from lightspine.data.batch import BadImage, Batch, Item, collate_images
from lightspine.data.dataset import ImageDataset
from lightspine.data.images import open_image
from lightspine.data.packed import PackedTexts
from lightspine.data.synsets import synset_description
from lightspine.errors import UsageError

__all__ = [
    "EXTENSIONS",
    "VAL_NAMES",
    "BadImage",
    "Batch",
    "FileSource",
    "FolderSplits",
    "ImageFolderDataset",
    "Item",
    "Sample",
    "collate_images",
    "find_class_folders",
    "find_images",
    "hold_out",
    "list_images",
    "scan_image_folder",
]

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TRAIN_NAME = "train"
VAL_NAMES = ("val", "validation", "valid", "test")


class Sample(NamedTuple):
    """One image file and the index of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class FolderSplits:
    """The files of a data set, split for training and validation."""

    class_names: list[str]
    train: list[Sample]
    val: list[Sample]


def scan_image_folder(
    root: str | Path, *, val_fraction: float = 0.2, seed: int = 0, val_split: str | None = None
) -> FolderSplits:
    """List the images of `root/train/CLASS` and `root/val/CLASS`, or split `root/CLASS`.

    "validation", "valid" and "test" stand for "val" too. Without such a folder a share of every class, chosen
    by `seed`, is held out of `root/train/CLASS` or `root/CLASS`.

    Args:
        root: the folder.
        val_fraction: share of every class that is held out, between 0 and 1; at least one image per class.
        seed: which images are held out.
        val_split: name of the folder to validate on, where `root` has several or an unusual one.

    Raises:
        UsageError: the folder is missing, has fewer than two class folders or not the split that was asked
            for; a class has no image, too few for a split, or is only in the validation folder.
    """
    root = Path(root)
    train_root = root / TRAIN_NAME if (root / TRAIN_NAME).is_dir() else root
    folders = find_class_folders(train_root)
    if train_root == root and set(folders) <= set(VAL_NAMES):
        raise UsageError(f"expected a folder train in {root} beside {' and '.join(folders)}")
    names = VAL_NAMES if val_split is None else (val_split,)
    val_root = next((root / name for name in names if train_root != root and (root / name).is_dir()), None)
    if val_split is not None and val_root is None:
        raise UsageError(
            f"expected a folder {val_split} in {root}, found {', '.join(find_class_folders(root))}"
        )
    class_names, train = list_images(train_root)
    if len(class_names) < 2:
        raise UsageError(f"expected at least two class folders in {train_root}, found only {class_names[0]}")
    if val_root is None:
        return FolderSplits(class_names, *hold_out(class_names, train, val_fraction, seed))
    if unknown := sorted(set(find_class_folders(val_root)) - set(class_names)):
        raise UsageError(f"class {unknown[0]} is in {val_root} but not in {train_root}")
    return FolderSplits(class_names, train, list_images(val_root, class_names)[1])


def list_images(root: str | Path, class_names: Sequence[str] | None = None) -> tuple[list[str], list[Sample]]:
    """Return the class names of a folder `root/CLASS/*`, sorted, and its images.

    Args:
        root: the folder; images may lie in folders below the class folder.
        class_names: number the classes by this list instead of by the folder's own names. A folder that is
            called by the WordNet id of an ImageNet class may stand in the list by the class's description.

    Raises:
        UsageError: the folder is missing or has no class folder, a class has no image or is not in
            `class_names`.
    """
    root = Path(root)
    found = find_class_folders(root)
    names = list(class_names) if class_names is not None else found
    numbers = {name: number for number, name in enumerate(names)}
    samples = []
    for name in found:
        number = numbers.get(name, numbers.get(synset_description(name) or name))
        if number is None:
            raise UsageError(f"class {name} of {root} is not among the model's {len(names)} classes")
        files = find_images(root / name)
        if not files:
            raise UsageError(f"class {name} of {root} has no image")
        samples += [Sample(file, number) for file in files]
    return names, samples


def find_class_folders(root: Path) -> list[str]:
    """Return the sorted names of the sub-folders of a folder, hidden ones left out.

    Raises:
        UsageError: the folder is missing or has no sub-folder.
    """
    if not root.is_dir():
        raise UsageError(
            f"expected a folder of images, but {root} {'is a file' if root.exists() else 'is missing'}"
        )
    found = sorted(
        entry.name for entry in root.iterdir() if not entry.name.startswith(".") and entry.is_dir()
    )
    if not found:
        raise UsageError(f"expected a folder with one sub-folder per class, but {root} has no sub-folder")
    return found


def find_images(folder: Path) -> list[Path]:
    """Return the image files of a folder and the folders below it, sorted, hidden ones left out."""
    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
    )


def hold_out(
    class_names: Sequence[str], samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those to train on and a share of every class, at least one image, to validate on.

    Raises:
        UsageError: a fraction outside 0 to 1, or a class with fewer than two images.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"expected a val_fraction between 0 and 1, got {fraction}")
    members: list[list[Sample]] = [[] for _ in class_names]
    for sample in samples:
        members[sample.label].append(sample)
    rng = np.random.default_rng(seed)
    train: list[Sample] = []
    val: list[Sample] = []
    for name, of_class in zip(class_names, members, strict=True):
        if len(of_class) < 2:
            raise UsageError(
                f"class {name} has {'one image' if of_class else 'no image'}, at least two are needed to "
                "hold one out for validation"
            )
        count = min(max(round(len(of_class) * fraction), 1), len(of_class) - 1)
        held_out = set(rng.permutation(len(of_class))[:count].tolist())
        train += [sample for i, sample in enumerate(of_class) if i not in held_out]
        val += [sample for i, sample in enumerate(of_class) if i in held_out]
    return train, val


class FileSource:
    """The images of a list of files.

    Args:
        samples: the files and their classes.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.paths = PackedTexts.pack(str(sample.path) for sample in samples)
        self.labels = np.fromiter((sample.label for sample in samples), dtype=np.int64, count=len(samples))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        """Return the path of an image."""
        return self.paths[position]

    def open(self, position: int) -> Image.Image:
        """Return an image as 8-bit RGB; raises as `open_image` does."""
        return open_image(self.paths[position])


class ImageFolderDataset(ImageDataset):
    """Reads image files; a bad one is reported with the item and never raises.

    Args:
        samples: the files and their classes.
        transform: turns a PIL RGB image into a (3, H, W) tensor.
        replace_bad: see `ImageDataset`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Image.Image], Tensor],
        *,
        replace_bad: bool = False,
    ) -> None:
        super().__init__(FileSource(samples), transform, replace_bad=replace_bad)
