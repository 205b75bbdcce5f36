"""Segmentation folder datasets: pairs of images and label maps, ADE20K included."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightspine.data.class_names import read_class_names
from lightspine.data.image_folder import draw_val_indices
from lightspine.data.published_classes import ade20k_class_names
from lightspine.data.segmentation.label_maps import IGNORED, MAX_CLASSES, LabelMapSource, LabelReader
from lightspine.data.split_names import TRAIN_SPLITS, VAL_SPLITS, find_split_folder, looks_like_split
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import IMAGE_SUFFIXES, ImageListing, list_folders
from lightspine.utils.progress import progress_bar

_log = logging.getLogger(__name__)

IMAGE_FOLDERS = ("images", "image", "imgs")
"""Names of the image folder, in order of preference."""

LABEL_FOLDERS = ("annotations", "labels", "masks")
"""Names of the folder of label maps, in order of preference."""

_LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
_CLASS_FILES = ("classes.txt", "class_names.txt", "labels.txt")
_ADE20K_CLASSES = "objectInfo150.txt"
_SAMPLED_PAIRS = 64


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
    default_names: Sequence[str] | None = None,
) -> SegmentationSplits:
    """List the pairs `root/images/train/*` and `root/annotations/train/*.png`, and the same for `val`.

    Label maps are in `annotations`, `labels` or `masks` and have the file name of their image. The split
    folders may also be called "training", "validation", "valid", "test" and "testing", in any case. Without a
    validation folder, a share of the images, chosen by `seed`, becomes the validation split. Every image is
    listed once; what is left out is logged, see `lightspine.utils.image_files.ImageListing`.

    A folder with ADE20K's `objectInfo150.txt` is read as the MIT scene parsing benchmark: value 0 is ignored,
    1 to 150 are the classes 0 to 149.

    Args:
        root: the folder.
        class_names: file with one class name per line; default: `classes.txt` in the folder.
        num_classes: number of classes if there is no file with their names; default: one more than the
            largest value in the label maps, which are all read.
        ignored: value of unlabeled pixels in the label maps (ignore index); `None` if there is none.
        remap: value in the label maps -> class index, or 255 to ignore it.
        val_fraction: share of the images, between 0 and 1, for validation if the folder has no splits.
        seed: seed of the split.
        default_names: class names, such as a checkpoint's, if there is no file with them and no number.

    Raises:
        UsageError: a folder or split is missing; no image has a label map; the label maps hold fewer than two
            classes, or their values are no class indices.
        LightspineError: the class names cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        state = "is a file" if root.exists() else "is missing"
        raise UsageError(f"expected a folder of images and labels, but {root} {state}")
    names: list[str] | None
    if class_names is None and num_classes is None and remap is None and (root / _ADE20K_CLASSES).is_file():
        names = read_ade20k_classes(root / _ADE20K_CLASSES)
        remap = {0: IGNORED} | {number + 1: number for number in range(len(names))}
        ignored = None
    else:
        names = _find_class_names(root, class_names, num_classes, default_names)
    images, labels = find_dense_folder(root, IMAGE_FOLDERS), find_dense_folder(root, LABEL_FOLDERS)
    train_images = find_split_folder(images, TRAIN_SPLITS)
    val_images = None if train_images is None else find_split_folder(images, VAL_SPLITS)
    if (
        train_images is not None
        and val_images is None
        and not any(looks_like_split(name) for name in list_folders(images) if name != train_images.name)
    ):
        images, labels = train_images, find_dense_folder(labels, TRAIN_SPLITS)
        train_images = None
    if train_images is None:
        _check_no_splits(images)
        listing = ImageListing(images)
        pairs, unpaired = pair_labels(images, labels, listing=listing)
        chosen = draw_val_indices(len(pairs), val_fraction, np.random.default_rng(seed), str(root))
        train = [pair for i, pair in enumerate(pairs) if i not in chosen]
        val = [pair for i, pair in enumerate(pairs) if i in chosen]
    else:
        val_images = find_dense_folder(images, VAL_SPLITS)
        listing = ImageListing(train_images, val_images)
        train, unpaired = pair_labels(train_images, find_dense_folder(labels, TRAIN_SPLITS), listing=listing)
        val, more_unpaired = pair_labels(val_images, find_dense_folder(labels, VAL_SPLITS), listing=listing)
        unpaired = unpaired + more_unpaired
    for path in unpaired:
        listing.left_out.add("image without a label map", str(path))
    listing.report()
    if names is None:
        count = _count_classes([*train, *val], ignored, remap)
        names = [str(number) for number in range(count)]
    reader = LabelReader(len(names), ignored=ignored, remap=remap)
    check_label_values(reader, train)
    return SegmentationSplits(names, reader, train, val, unpaired)


def pair_labels(
    images: Path, labels: Path, *, listing: ImageListing | None = None
) -> tuple[list[LabeledImage], list[Path]]:
    """Pair the images of a folder with the label maps of another folder by relative path without suffix.

    Args:
        images: folder of the images.
        labels: folder of the label maps.
        listing: listing of a dataset of several folders, whose caller reports what was left out; default: a
            new one, whose omissions are logged.

    Returns:
        The pairs, sorted, and the images without a label map.

    Raises:
        UsageError: there is no pair, or two images or two label maps have the same name apart from the
            suffix.
    """
    own = ImageListing(images) if listing is None else listing
    # The omissions of the label folder are those of the image folder, or label maps that are not lossless.
    label_files = _index_stems(labels, ImageListing(labels, repeat_links=True).list(labels), _LABEL_SUFFIXES)
    image_files = _index_stems(images, own.list(images), IMAGE_SUFFIXES)
    pairs = [
        LabeledImage(path, label_files[stem]) for stem, path in image_files.items() if stem in label_files
    ]
    if not pairs:
        raise UsageError(
            f"none of the {len(image_files)} images of {images} has a label map of the same name in "
            f"{labels}, which has {len(label_files)} label maps ({', '.join(_LABEL_SUFFIXES)}); "
            "`lightspine convert-data masks` reads names such as NAME_mask.png"
        )
    if listing is None:
        own.report()
    return pairs, [path for stem, path in image_files.items() if stem not in label_files]


def _index_stems(folder: Path, files: Sequence[Path], suffixes: Collection[str]) -> dict[Path, Path]:
    """Return relative path without suffix -> file."""
    found: dict[Path, Path] = {}
    for path in files:
        if path.suffix.lower() in suffixes:
            stem = path.relative_to(folder).with_suffix("")
            if stem in found:
                raise UsageError(
                    f"expected one file {stem} in {folder}, found {found[stem].name} and {path.name}"
                )
            found[stem] = path
    return found


def read_ade20k_classes(path: str | Path) -> list[str]:
    """Read the class names of ADE20K's `objectInfo150.txt`: the first synonym in the last column.

    Where two classes share the first synonym, all synonyms are kept. Releases of the file order the synonyms
    differently: for the 150 classes of the benchmark, `ade20k_class_names` chooses among them.

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
    published = ade20k_class_names()
    synonyms = [[word.strip() for word in name.split(",")] for name in names]
    if len(names) == len(published) and all(map(list.__contains__, synonyms, published)):
        return published
    first = [name.split(",")[0].strip() for name in names]
    return [short if first.count(short) == 1 else name for short, name in zip(first, names, strict=True)]


def check_label_values(reader: LabelMapSource, pairs: Sequence[LabeledImage]) -> None:
    """Check that the label maps hold at least two classes besides ignored pixels.

    With fewer, the loss is 0 and every score perfect: in binary masks of 0 and 255, for example, the
    foreground has the value of ignored pixels. Label maps are read until two classes are found, those of a
    sample spread over the dataset first.

    Raises:
        UsageError: there are fewer than two classes, or none of the sampled label maps can be read.
    """
    count = min(_SAMPLED_PAIRS, len(pairs))
    sample = [len(pairs) * number // count for number in range(count)]
    rest = sorted(set(range(len(pairs))) - set(sample))
    found: set[int] = set()
    readable, reason = False, ""
    for done, position in enumerate(progress_bar([*sample, *rest], "checking the label maps")):
        try:
            found.update(np.unique(reader.read(str(pairs[position].labels))).tolist())
            readable = True
        # Single damaged files are reported when training reads them.
        except LightspineError as error:
            reason = reason or str(error)
        if len(found - {IGNORED}) > 1:
            return
        if done + 1 == count and not readable:
            raise UsageError(f"none of {count} label maps can be read: {reason}")
    classes = " and ".join(f"class {number}" for number in sorted(found - {IGNORED})) or "no class"
    ignored = " and ignored pixels (255)" if IGNORED in found else ""
    raise UsageError(
        f"expected at least two classes in the {len(pairs)} label maps, such as {pairs[0].labels}, got "
        f"{classes}{ignored} only: if the files mark a class with 255 or another value, convert "
        "them with `lightspine convert-data masks`, or pass remap={0: 0, 255: 1}"
    )


def _check_no_splits(images: Path) -> None:
    """Reject folders below the images that look like splits of an unknown name.

    Raises:
        UsageError: all sub-folders look like splits.
    """
    folders = list_folders(images)
    if folders and all(map(looks_like_split, folders)):
        raise UsageError(
            f"the folders {' and '.join(folders)} of {images} look like splits: rename them to train and val"
        )


def _count_classes(
    pairs: Sequence[LabeledImage], ignored: int | None, remap: Mapping[int, int] | None
) -> int:
    """Return one more than the largest class index in the label maps.

    Raises:
        UsageError: most of the indices up to the largest one are in no label map.
    """
    if remap is not None:
        return max((number for number in remap.values() if number != IGNORED), default=0) + 1
    reader, found = LabelReader(MAX_CLASSES, ignored=ignored), {0}
    for pair in progress_bar(pairs, "finding the classes in the label maps"):
        found.update(np.unique(reader.read(str(pair.labels))).tolist())
    values = sorted(found - {IGNORED})
    if values[-1] + 1 > 2 * len(values):
        shown = ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
        example = ", ".join(f"{value}: {number}" for number, value in enumerate(values[:3]))
        raise UsageError(
            f"expected class indices from 0 in the label maps, such as {pairs[0].labels}, got the values "
            f"{shown}: pass remap={{{example}{', ...' if len(values) > 3 else ''}}}, the class of each "
            f"value, or a file {_CLASS_FILES[0]} with the name of every index"
        )
    _log.info(
        "found %d %s in the label maps, called by their values: %s in the folder would name them",
        values[-1] + 1,
        "classes" if values[-1] else "class",
        _CLASS_FILES[0],
    )
    return int(values[-1]) + 1


def _find_class_names(
    root: Path, file: str | Path | None, num_classes: int | None, default: Sequence[str] | None
) -> list[str] | None:
    """Return the class names, or `None` if they must be found in the label maps."""
    found = next((root / name for name in _CLASS_FILES if (root / name).is_file()), None)
    chosen = file if file is not None else found if num_classes is None else None
    if chosen is None:
        if num_classes is None:
            return None if default is None else list(default)
        return [str(number) for number in range(num_classes)]
    names = read_class_names(chosen)
    if num_classes is not None and num_classes != len(names):
        raise UsageError(f"expected {num_classes} class names in {chosen}, found {len(names)}")
    return names


def find_dense_folder(root: Path, names: Sequence[str]) -> Path:
    """Return the first sub-folder of `root` with one of the names, in any case.

    Raises:
        UsageError: there is none.
    """
    found = find_split_folder(root, names)
    if found is None:
        raise UsageError(f"expected a folder {' or '.join(names)} in {root}")
    return found
