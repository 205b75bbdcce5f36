"""ImageNet in its official layout: class folders named by WordNet ids, and a flat validation folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from lightspine.data.class_mapping import ClassMapping
from lightspine.data.image_folder import (
    FolderSplits,
    Sample,
    find_class_folders,
    list_images,
)
from lightspine.data.imagenet_classes import imagenet_synsets, is_synset, synset_descriptions
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import list_folders, list_image_files

VAL_LISTS = ("LOC_val_solution.csv", "val.txt", "imagenet_2012_validation_synset_labels.txt")
"""File names to search for the list of validation labels, in this order."""


def scan_imagenet(root: str | Path, *, val_list: str | Path | None = None) -> FolderSplits:
    """List the images of `root/train/n01440764/*` and of `root/val`.

    Class indices follow the sorted order of the WordNet ids, as in the published checkpoints; class names are
    ImageNet's descriptions of the ids.

    Args:
        root: folder with `train` and `val`.
        val_list: see `list_imagenet_val`; default: searched in `root`.

    Raises:
        UsageError: a folder is missing, or a class folder is not named by a WordNet id; see also
            `list_imagenet_val`.
        LightspineError: the list cannot be read.
    """
    root = Path(root)
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise UsageError(f"expected ImageNet's folders train and val in {root}, but {split} is missing")
    synsets, train = list_images(root / "train")
    if odd := [name for name in synsets if not is_synset(name)]:
        raise UsageError(
            f"expected class folders named by WordNet ids, such as n01440764, in {root / 'train'}, "
            f"got {odd[0]}; use ImageFolderDataModule for other classes"
        )
    val = list_imagenet_val(root / "val", synsets, val_list=val_list)
    return FolderSplits(synset_descriptions(synsets), train, val)


def list_imagenet_val(
    folder: str | Path, synsets: Sequence[str], *, val_list: str | Path | None = None
) -> list[Sample]:
    """List ImageNet's validation images, in class folders or in one flat folder with a list of labels.

    Args:
        folder: `folder/n01440764/*` or `folder/ILSVRC2012_val_00000001.JPEG`, ...
        synsets: WordNet ids in the order of the class indices.
        val_list: classes of a flat folder: lines "NAME ID" or "NAME INDEX", Kaggle's `LOC_val_solution.csv`,
            or one WordNet id per line in the order of the image names. Default: the first of `VAL_LISTS` in
            the folder or its parent.

    Raises:
        UsageError: there is no image or no list, or the list lacks an image or has a class that is not in
            `synsets`.
        LightspineError: the list cannot be read.
    """
    folder = Path(folder)
    if list_folders(folder):
        return list_images(folder, synsets)[1]
    files = list_image_files(folder)
    if not files:
        raise UsageError(f"expected class folders or images in {folder}, which has neither")
    source = _find_list(folder) if val_list is None else Path(val_list)
    classes = _read_list(source, files)
    numbers = {name: number for number, name in enumerate(synsets)}
    numbers |= {str(number): number for number in range(len(synsets))}
    samples = []
    for file in files:
        written = classes.get(file.stem)
        if written is None:
            raise UsageError(f"image {file.name} of {folder} is not in the list {source}")
        if written not in numbers:
            raise UsageError(f"class {written} in {source} is not among the {len(synsets)} classes")
        samples.append(Sample(file, numbers[written]))
    return samples


def imagenet_class_mapping(root: str | Path) -> ClassMapping:
    """Class mapping for a test set whose folder names identify the ImageNet-1k classes.

    Args:
        root: folders named by WordNet ids (ImageNet-A, -R, -Sketch) or by class indices from 0 to 999
            (ImageNet-V2).

    Raises:
        UsageError: the folder is missing, or a folder is neither a WordNet id of ImageNet-1k nor a number
            below 1000.
    """
    synsets = imagenet_synsets()
    numbers = {name: number for number, name in enumerate(synsets)}
    numbers |= {str(number): number for number in range(len(synsets))}
    folders = find_class_folders(Path(root))
    if unknown := [name for name in folders if name not in numbers]:
        raise UsageError(
            f"expected folders named by WordNet ids of ImageNet-1k or numbers below 1000 in {root}, "
            f"got {unknown[0]}"
        )
    return ClassMapping(folders={name: numbers[name] for name in folders})


def _find_list(folder: Path) -> Path:
    places = [base / name for base in (folder, folder.parent) for name in VAL_LISTS]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UsageError(
            f"the images of {folder} are not in class folders: pass a list of their classes as val_list, or "
            f"put {' or '.join(VAL_LISTS)} into {folder.parent}"
        )
    return found


def _read_list(path: Path, files: Sequence[Path]) -> dict[str, str]:
    """Return image name without suffix -> class as written."""
    if not path.is_file():
        raise UsageError(f"expected a list of validation classes, but {path} is not a file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LightspineError(f"cannot read the list {path}: {error}") from error
    rows = [re.split(r"[,\s]+", line) for line in lines]
    if rows and rows[0][0].lower() == "imageid":
        rows = rows[1:]
    if all(len(row) == 1 for row in rows):
        # The development kit numbers the classes in the order of its meta.mat.
        if not all(is_synset(row[0]) for row in rows):
            raise UsageError(
                f"expected a WordNet id per line in {path}; the class numbers in the development kit's "
                "ground truth do not follow the order of the ids"
            )
        if len(rows) != len(files):
            raise UsageError(f"expected {len(files)} lines, one per image, in {path}, got {len(rows)}")
        return {file.stem: row[0] for file, row in zip(files, rows, strict=True)}
    return {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}
