"""Paths of COCO annotation files and their image folders."""

from collections.abc import Sequence
from pathlib import Path

from lightspine.data.split_names import TRAIN_SPLITS, VAL_SPLITS, find_split
from lightspine.errors import UsageError

_PREFIX = "instances_"
TRAIN_COCO_SPLITS = ("train2017", *TRAIN_SPLITS)
"""Names of the training split, in order of preference."""

VAL_COCO_SPLITS = ("val2017", *VAL_SPLITS)
"""Names of the validation split, in order of preference."""


def coco_paths(root: str | Path, split: str) -> tuple[Path, Path]:
    """Return the paths `annotations/instances_SPLIT.json` (annotation file) and `SPLIT/` (image folder)."""
    return Path(root, "annotations", f"{_PREFIX}{split}.json"), Path(root, split)


def is_coco(data: str | Path) -> bool:
    """Return whether a path is a COCO annotation file or a COCO folder; see `coco_paths`."""
    path = Path(data)
    return path.suffix == ".json" or bool(_list_splits(path))


def find_coco(
    data: str | Path, images: str | Path | None = None, split: str | None = None
) -> tuple[Path, Path]:
    """Find the annotation file and the image folder to evaluate on.

    Args:
        data: annotation file, or a folder with the layout of `coco_paths`.
        images: image folder, if it is elsewhere.
        split: split of the folder; default: the first of val2017, val, validation, valid, test
            and testing, in any case.

    Raises:
        UsageError: the folder has no such split, or the image folder is not found.
    """
    path = Path(data)
    if path.suffix == ".json":
        if split is not None:
            raise UsageError(f"expected no split together with the file {path}, got {split!r}")
        if images is not None:
            return path, Path(images)
        folder = path.parent.parent / path.stem.removeprefix(_PREFIX)
        if not folder.is_dir():
            raise UsageError(
                f"expected the images of {path} in {folder}, which is not a folder: pass --images"
            )
        return path, folder
    file, folder = coco_paths(path, find_coco_split(path, VAL_COCO_SPLITS if split is None else (split,)))
    return file, Path(images or folder)


def find_coco_split(root: str | Path, names: Sequence[str]) -> str:
    """Return the first of `names` that is a split of a COCO folder, in any case.

    Raises:
        UsageError: the folder has no such split.
    """
    found = _list_splits(Path(root))
    if not found:
        raise UsageError(f"expected a COCO file or a folder with annotations/{_PREFIX}SPLIT.json, got {root}")
    chosen = find_split(found, names, root)
    if chosen is None:
        expected = f"one of {', '.join(names)}" if len(names) > 1 else repr(names[0])
        raise UsageError(f"expected a split {expected} in {root}, found {', '.join(found)}")
    return chosen


def _list_splits(folder: Path) -> list[str]:
    files = folder.glob(f"annotations/{_PREFIX}*.json")
    return sorted(file.stem.removeprefix(_PREFIX) for file in files)
