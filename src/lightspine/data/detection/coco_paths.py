"""Paths of COCO annotation files and their image folders."""

from collections.abc import Sequence
from pathlib import Path

from lightspine.data.split_names import TRAIN_SPLITS, VAL_SPLITS, find_split
from lightspine.errors import UsageError

_PREFIX = "instances_"
# The name of Roboflow's COCO export, in the image folder of each split.
_BESIDE_IMAGES = "_annotations.coco.json"
_LAYOUT = f"annotations/{_PREFIX}SPLIT.json, SPLIT/{_BESIDE_IMAGES} or SPLIT.json"
_COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')

TRAIN_COCO_SPLITS = ("train2017", *TRAIN_SPLITS)
"""Names of the training split, in order of preference."""

VAL_COCO_SPLITS = ("val2017", *VAL_SPLITS)
"""Names of the validation split, in order of preference."""


def list_coco_splits(root: str | Path) -> dict[str, tuple[Path, Path]]:
    """Return split -> (annotation file, image folder) of a COCO folder.

    The layouts are `annotations/instances_SPLIT.json` with the images in `SPLIT/`, `images/SPLIT/` or
    `images/`, and `SPLIT/_annotations.coco.json` next to the images. In a folder without these, every
    COCO file in it or in `annotations/` is a split with the name of the file, such as `train.json` or Label
    Studio's `result.json`, with the images in `SPLIT/`, `images/SPLIT/`, `images/` or the folder itself.
    """
    root = Path(root)
    found = {}
    for file in _list_files(root, f"annotations/{_PREFIX}*.json"):
        split = file.stem.removeprefix(_PREFIX)
        found[split] = file, _first_folder(root / split, root / "images" / split, root / "images")
    for file in _list_files(root, f"*/{_BESIDE_IMAGES}"):
        found.setdefault(file.parent.name, (file, file.parent))
    if not found:
        files = [file for folder in (root, root / "annotations") for file in _list_files(folder, "*.json")]
        for file in filter(_has_coco_keys, files):
            folder = _first_folder(root / file.stem, root / "images" / file.stem, root / "images", root)
            found.setdefault(file.stem, (file, folder))
    return found


def _list_files(folder: Path, pattern: str) -> list[Path]:
    # Reading a named pipe or a device would never end.
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _first_folder(*folders: Path) -> Path:
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _has_coco_keys(file: Path) -> bool:
    """Return whether a JSON file has the lists of a COCO file of objects, without parsing it."""
    try:
        content = file.read_bytes()
    # A file that cannot be read is none of the dataset's.
    except OSError:
        return False
    return all(key in content for key in _COCO_KEYS)


def coco_paths(root: str | Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split, which may be missing."""
    default = Path(root, "annotations", f"{_PREFIX}{split}.json"), Path(root, split)
    return list_coco_splits(root).get(split, default)


def is_coco(data: str | Path) -> bool:
    """Return whether a path is a COCO annotation file or a COCO folder; see `list_coco_splits`."""
    path = Path(data)
    return path.suffix == ".json" or bool(list_coco_splits(path))


def find_coco(
    data: str | Path, images: str | Path | None = None, split: str | None = None
) -> tuple[Path, Path]:
    """Find the annotation file and the image folder to evaluate on.

    Args:
        data: annotation file, or a folder with a layout of `list_coco_splits`.
        images: image folder, if it is elsewhere.
        split: split of the folder; default: the first of val2017, val, validation, valid, test and testing,
            in any case, or the only split.

    Raises:
        UsageError: the folder has no such split, or the image folder is not found.
    """
    path = Path(data)
    if path.suffix == ".json":
        if split is not None:
            raise UsageError(f"expected no split together with the file {path}, got {split!r}")
        if images is not None:
            return path, Path(images)
        folder = _find_images(path)
        if not folder.is_dir():
            raise UsageError(
                f"expected the images of {path} in {folder}, which is not a folder: pass --images"
            )
        return path, folder
    found = list_coco_splits(path)
    if split is None and len(found) == 1:
        file, folder = next(iter(found.values()))
    else:
        file, folder = found[find_coco_split(path, VAL_COCO_SPLITS if split is None else (split,))]
    return file, Path(images or folder)


def find_train_split(root: str | Path) -> str:
    """Return the training split of a COCO folder, or its only split under any name, such as CVAT's `default`.

    Raises:
        UsageError: the folder has several splits, or only a validation split, and none for training.
    """
    found = list(list_coco_splits(root))
    if len(found) == 1 and find_split(found, VAL_COCO_SPLITS, root) is None:
        return found[0]
    return find_coco_split(root, TRAIN_COCO_SPLITS)


def find_coco_split(root: str | Path, names: Sequence[str]) -> str:
    """Return the first of `names` that is a split of a COCO folder, in any case.

    Raises:
        UsageError: the folder has no such split.
    """
    found = list_coco_splits(root)
    if not found:
        raise UsageError(f"expected a COCO file or a folder with {_LAYOUT}, got {root}")
    chosen = find_split(found, names, root)
    if chosen is None:
        expected = f"one of {', '.join(names)}" if len(names) > 1 else repr(names[0])
        raise UsageError(f"expected a split {expected} in {root}, found {', '.join(found)}")
    return chosen


def _find_images(file: Path) -> Path:
    """Return the image folder of an annotation file."""
    if file.name == _BESIDE_IMAGES:
        return file.parent
    root, split = file.parent.parent, file.stem.removeprefix(_PREFIX)
    return next((folder for own, folder in list_coco_splits(root).values() if own == file), root / split)
