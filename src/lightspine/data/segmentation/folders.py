"""Segmentation folder datasets: pairs of images and label maps, ADE20K included."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightspine.data.class_names import read_class_names
from lightspine.data.image_folder import draw_val_indices
from lightspine.data.segmentation.label_maps import IGNORED, LabelReader
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import list_image_files

_IMAGE_FOLDERS = ("images", "image", "imgs")
_LABEL_FOLDERS = ("annotations", "labels", "masks")
_LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid", "test")
_CLASS_FILES = ("classes.txt", "class_names.txt", "labels.txt")
_ADE20K_CLASSES = "objectInfo150.txt"
_CHECKED_PAIRS = 16


class LabeledImage(NamedTuple):
    """Paths of an image and its label map."""

    image: Path
    labels: Path


@dataclass(frozen=True)
class SegmentationSplits:
    """Training and validation pairs of a dataset.

    Attributes:
        class_names: names in the order of the class indices.
        reader: reads the label maps.
        train: training pairs.
        val: validation pairs.
        unpaired: images without a label map, which are left out.
    """

    class_names: list[str]
    reader: LabelReader
    train: list[LabeledImage]
    val: list[LabeledImage]
    unpaired: list[Path]


def scan_segmentation_folder(
    root: str | Path,
    *,
    class_names: str | Path | None = None,
    num_classes: int | None = None,
    ignored: int | None = IGNORED,
    remap: Mapping[int, int] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> SegmentationSplits:
    """List the pairs `root/images/train/*` and `root/annotations/train/*.png`, and the same for `val`.

    Label maps are in `annotations`, `labels` or `masks` and have the file name of their image. The split
    folders may also be called "training", "validation", "valid" and "test". Without split folders, a share of
    all images, chosen by `seed`, becomes the validation split.

    A folder with ADE20K's `objectInfo150.txt` is read as the MIT scene parsing benchmark: value 0 is ignored,
    1 to 150 are the classes 0 to 149.

    Args:
        root: the folder.
        class_names: file with one class name per line; default: `classes.txt` in the folder.
        num_classes: number of classes if there is no file with their names.
        ignored: value of unlabeled pixels in the label maps (ignore index); `None` if there is none.
        remap: value in the label maps -> class index, or 255 to ignore it.
        val_fraction: share of the images, between 0 and 1, for validation if the folder has no splits.
        seed: seed of the split.

    Raises:
        UsageError: a folder, split or the class names are missing; no image has a label map; label maps of
            two classes contain only one class and 255.
        LightspineError: the class names cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        state = "is a file" if root.exists() else "is missing"
        raise UsageError(f"expected a folder of images and labels, but {root} {state}")
    if class_names is None and num_classes is None and remap is None and (root / _ADE20K_CLASSES).is_file():
        names = read_ade20k_classes(root / _ADE20K_CLASSES)
        remap = {0: IGNORED} | {number + 1: number for number in range(len(names))}
        ignored = None
    else:
        names = _find_class_names(root, class_names, num_classes)
    reader = LabelReader(len(names), ignored=ignored, remap=remap)
    images, labels = _find_folder(root, _IMAGE_FOLDERS), _find_folder(root, _LABEL_FOLDERS)
    if not any((images / name).is_dir() for name in _TRAIN):
        pairs, unpaired = pair_labels(images, labels)
        chosen = draw_val_indices(len(pairs), val_fraction, np.random.default_rng(seed), str(root))
        train = [pair for i, pair in enumerate(pairs) if i not in chosen]
        val = [pair for i, pair in enumerate(pairs) if i in chosen]
    else:
        train, unpaired = pair_labels(_find_folder(images, _TRAIN), _find_folder(labels, _TRAIN))
        val, more_unpaired = pair_labels(_find_folder(images, _VAL), _find_folder(labels, _VAL))
        unpaired = unpaired + more_unpaired
    _check_two_classes(reader, train)
    return SegmentationSplits(names, reader, train, val, unpaired)


def pair_labels(images: Path, labels: Path) -> tuple[list[LabeledImage], list[Path]]:
    """Pair the images of a folder with the label maps of another folder by relative path without suffix.

    Returns:
        The pairs, sorted, and the images without a label map.

    Raises:
        UsageError: there is no pair.
    """
    label_files = {
        path.relative_to(labels).with_suffix(""): path
        for path in list_image_files(labels)
        if path.suffix.lower() in _LABEL_SUFFIXES
    }
    files = list_image_files(images)
    stems = [path.relative_to(images).with_suffix("") for path in files]
    pairs = [
        LabeledImage(path, label_files[stem])
        for path, stem in zip(files, stems, strict=True)
        if stem in label_files
    ]
    if not pairs:
        raise UsageError(
            f"none of the {len(files)} images of {images} has a label map of the same name in {labels}, "
            f"which has {len(label_files)} label maps"
        )
    return pairs, [path for path, stem in zip(files, stems, strict=True) if stem not in label_files]


def read_ade20k_classes(path: str | Path) -> list[str]:
    """Read the class names of ADE20K's `objectInfo150.txt`: the first synonym in the last column.

    Where two classes share the first synonym, all synonyms are kept.

    Raises:
        LightspineError: the file is not such a table.
    """
    path = Path(path)
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LightspineError(f"cannot read class names {path}: {error}") from error
    numbers = [row[0].strip() for row in rows[1:]]
    if not numbers or numbers != [str(number + 1) for number in range(len(numbers))]:
        raise LightspineError(f"expected a table of classes numbered from 1, with a header, in {path}")
    names = [row[-1].strip() for row in rows[1:]]
    first = [name.split(",")[0].strip() for name in names]
    return [short if first.count(short) == 1 else name for short, name in zip(first, names, strict=True)]


def _check_two_classes(reader: LabelReader, pairs: Sequence[LabeledImage]) -> None:
    """Reject binary masks of 0 and 255, whose foreground would be ignored (255 is the ignore index)."""
    if reader.num_classes != 2:
        return
    found: set[int] = set()
    for pair in pairs[:_CHECKED_PAIRS]:
        # Damaged files are reported when training reads them.
        with contextlib.suppress(LightspineError):
            found.update(np.unique(reader.read(pair.labels)).tolist())
    if IGNORED in found and len(found) == 2:
        raise UsageError(
            f"expected two classes in the label maps, such as {pairs[0].labels}, got class {min(found)} and "
            "ignored pixels (255) only: if 255 is a class, pass remap={0: 0, 255: 1}"
        )


def _find_class_names(root: Path, file: str | Path | None, num_classes: int | None) -> list[str]:
    found = next((root / name for name in _CLASS_FILES if (root / name).is_file()), None)
    chosen = file if file is not None else found if num_classes is None else None
    if chosen is None:
        if num_classes is None:
            raise UsageError(
                f"expected class names: a file {_CLASS_FILES[0]} in {root}, a file of another name given as "
                "class_names, or their number given as num_classes"
            )
        return [str(number) for number in range(num_classes)]
    names = read_class_names(chosen)
    if num_classes is not None and num_classes != len(names):
        raise UsageError(f"expected {num_classes} class names in {chosen}, found {len(names)}")
    return names


def _find_folder(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UsageError(f"expected a folder {' or '.join(names)} in {root}")
