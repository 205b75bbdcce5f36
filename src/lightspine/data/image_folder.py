"""Image folder datasets with one sub-folder per class, as in torchvision's ImageFolder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from lightspine.data.dataset import ImageDataset
from lightspine.data.imagenet_classes import synset_description
from lightspine.data.split_names import (
    TRAIN_SPLITS,
    VAL_SPLITS,
    find_split,
    find_split_folder,
    looks_like_split,
)
from lightspine.errors import UsageError
from lightspine.utils.files import text_from_path
from lightspine.utils.image_files import ImageListing, list_folders, open_image, read_image_file
from lightspine.utils.packed_strings import PackedStrings

_OTHER_LAYOUT = frozenset(
    {"annotation", "annotations", "image", "images", "imgs", "jpegimages", "label", "labels", "mask", "masks"}
)


class Sample(NamedTuple):
    """Path of an image and its class index."""

    path: Path
    label: int


@dataclass(frozen=True)
class FolderSplits:
    """Training and validation samples of a dataset."""

    class_names: list[str]
    train: list[Sample]
    val: list[Sample]


def scan_image_folder(
    root: str | Path, *, val_fraction: float = 0.2, seed: int = 0, val_split: str | None = None
) -> FolderSplits:
    """List the images of `root/train/CLASS` and `root/val/CLASS`, or split those of `root/CLASS`.

    The split folders may be written in any case, and may also be called "training", and "validation",
    "valid", "test" or "testing". Without a validation folder, a share of every class in `root/train/CLASS` or
    `root/CLASS`, chosen by `seed`, becomes the validation split. Every image is listed once; what is left out
    is logged, see `lightspine.utils.image_files.ImageListing`.

    Args:
        root: the folder.
        val_fraction: share of every class, between 0 and 1, for validation; at least one image per class.
        seed: seed of the split.
        val_split: name of the validation folder, if `root` has several or its name is a different one.

    Raises:
        UsageError: the folder is missing, has fewer than two class folders, lacks the requested split, or has
            the layout of another kind of dataset; a class has no image, too few to be split, or exists only
            in the validation folder.
    """
    root = Path(root)
    folders = find_class_folders(root)
    train_root = find_split_folder(root, TRAIN_SPLITS)
    val_root = None
    if val_split is not None or train_root is not None:
        val_root = find_split_folder(root, VAL_SPLITS if val_split is None else (val_split,))
    if val_split is not None and (val_root is None or train_root is None):
        expected = val_split if val_root is None else "train"
        raise UsageError(f"expected a folder {expected} in {root}, found {', '.join(folders)}")
    if train_root is None:
        _check_class_layout(root, folders)
        train_root = root
    elif val_root is None and (others := [name for name in folders if _may_be_val(name)]):
        raise UsageError(
            f"expected a folder {' or '.join(VAL_SPLITS)} next to {train_root}, found "
            f"{' and '.join(others)}: pass its name as val_split"
        )
    listing = ImageListing(train_root) if val_root is None else ImageListing(train_root, val_root)
    class_names, train = list_images(train_root, listing=listing)
    if len(class_names) < 2:
        raise UsageError(f"expected at least two class folders in {train_root}, found only {class_names[0]}")
    if val_root is None:
        splits = FolderSplits(class_names, *train_val_split(class_names, train, val_fraction, seed))
    else:
        if unknown := sorted(set(map(text_from_path, find_class_folders(val_root))) - set(class_names)):
            raise UsageError(f"class {unknown[0]} is in {val_root} but not in {train_root}")
        splits = FolderSplits(class_names, train, list_images(val_root, class_names, listing=listing)[1])
    listing.report()
    return splits


def _may_be_val(name: str) -> bool:
    return looks_like_split(name) and "train" not in name.lower()


def _check_class_layout(root: Path, folders: Sequence[str]) -> None:
    """Reject folders that are splits, or images and labels of another task, instead of classes.

    Raises:
        UsageError: the names or the sub-folders of the class folders show another layout.
    """
    if all(map(looks_like_split, folders)):
        known = [name for name in folders if find_split([name], VAL_SPLITS, root)]
        if len(known) == len(folders):
            raise UsageError(f"expected a folder train next to {' and '.join(folders)} in {root}")
        raise UsageError(
            f"the folders {' and '.join(folders)} of {root} look like splits, not classes: rename them to "
            "train and val"
        )
    if all(name.lower() in _OTHER_LAYOUT for name in folders):
        raise UsageError(
            f"the folders {' and '.join(folders)} of {root} look like a dataset for detection or "
            "segmentation, but one sub-folder per class is expected; `lightspine convert-data` reads VOC, "
            "YOLO, LabelMe and masks"
        )
    for name in folders:
        inside = list_folders(root / name)
        train, val = (find_split(inside, names, root / name) for names in (TRAIN_SPLITS, VAL_SPLITS))
        if train is not None and val is not None:
            raise UsageError(
                f"the class folder {root / name} contains the splits {train} and {val}, but they are "
                f"expected above the classes: {root / train / name}"
            )


def list_images(
    root: str | Path, class_names: Sequence[str] | None = None, *, listing: ImageListing | None = None
) -> tuple[list[str], list[Sample]]:
    """List the images of a folder with one sub-folder per class.

    Args:
        root: the folder; images may lie at any depth below the class folders.
        class_names: names in the order of the class indices, in place of the sorted folder names. A folder
            named by a WordNet id also matches ImageNet's description of the id.
        listing: listing of a dataset of several folders, whose caller reports what was left out; default: a
            new one, whose omissions are logged.

    Returns:
        The class names, and the samples sorted by path.

    Raises:
        UsageError: the folder is missing or has no class folder, a class has no image or is not in
            `class_names`.
    """
    root = Path(root)
    own = ImageListing(root) if listing is None else listing
    found = find_class_folders(root, own)
    # Class names are saved with the model, so they must not depend on the locale as file names do.
    texts = [text_from_path(name) for name in found]
    names = list(class_names) if class_names is not None else texts
    indices = {name: number for number, name in enumerate(names)}
    samples = []
    for folder, name in zip(found, texts, strict=True):
        index = indices.get(name, indices.get(synset_description(name) or name))
        if index is None:
            raise UsageError(f"class {name} of {root} is not among the model's {len(names)} classes")
        files = own.list(root / folder)
        if not files:
            reason = f"; left out: {own.left_out}" if own.left_out else ""
            raise UsageError(f"class {name} of {root} has no image{reason}")
        samples += [Sample(file, index) for file in files]
    if listing is None:
        own.report()
    return names, samples


def find_class_folders(root: Path, listing: ImageListing | None = None) -> list[str]:
    """Return the sorted names of a folder's sub-folders; hidden ones are left out.

    Args:
        root: the folder.
        listing: listing that counts what is left out.

    Raises:
        UsageError: the folder is missing or has no sub-folder.
    """
    if not root.is_dir():
        raise UsageError(
            f"expected a folder of images, but {root} {'is a file' if root.exists() else 'is missing'}"
        )
    found = list_folders(root) if listing is None else listing.list_folders(root)
    if not found:
        raise UsageError(
            f"expected a folder with one sub-folder per class, but {root} has no sub-folder; "
            "`lightspine convert-data` reads VOC, YOLO, LabelMe and masks"
        )
    return found


def train_val_split(
    class_names: Sequence[str], samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into training and validation, stratified by class: at least one image of each in both.

    Raises:
        UsageError: a fraction outside 0 to 1, or a class with fewer than two images.
    """
    members: list[list[Sample]] = [[] for _ in class_names]
    for sample in samples:
        members[sample.label].append(sample)
    rng = np.random.default_rng(seed)
    train: list[Sample] = []
    val: list[Sample] = []
    for name, of_class in zip(class_names, members, strict=True):
        chosen = draw_val_indices(len(of_class), fraction, rng, f"class {name}")
        train += [sample for i, sample in enumerate(of_class) if i not in chosen]
        val += [sample for i, sample in enumerate(of_class) if i in chosen]
    return train, val


def draw_val_indices(count: int, fraction: float, rng: np.random.Generator, where: str) -> set[int]:
    """Draw the validation indices out of `count` images: at least one, but not all.

    Raises:
        UsageError: a fraction outside 0 to 1, or fewer than two images.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"expected a val_fraction between 0 and 1, got {fraction}")
    if count < 2:
        raise UsageError(f"expected at least two images in {where} to split them for validation, got {count}")
    number = min(max(round(count * fraction), 1), count - 1)
    return set(rng.permutation(count)[:number].tolist())


class FileSource:
    """Image source for image files.

    Args:
        samples: paths and class indices.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.paths = PackedStrings.pack(str(sample.path) for sample in samples)
        self.labels = np.fromiter((sample.label for sample in samples), dtype=np.int64, count=len(samples))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        """Return the path of an image."""
        return self.paths[position]

    def open(self, position: int) -> Image.Image:
        """Decode an image to 8-bit RGB, as `open_image` does."""
        return open_image(self.paths[position])

    def read(self, position: int) -> bytes:
        """Read the encoded bytes of an image, as `read_image_file` does."""
        return read_image_file(self.paths[position])


class ImageFolderDataset(ImageDataset):
    """Dataset of image files.

    Args:
        samples: paths and class indices.
        transform: maps a PIL RGB image to a (3, H, W) tensor.
        replace_bad: see `BadImageTolerantDataset`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Image.Image], Tensor],
        *,
        replace_bad: bool = False,
    ) -> None:
        super().__init__(FileSource(samples), transform, replace_bad=replace_bad)
