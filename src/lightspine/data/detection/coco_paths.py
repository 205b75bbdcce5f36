"""Paths of COCO annotation files and their image folders."""

from pathlib import Path

from lightspine.errors import UsageError

_PREFIX = "instances_"
_VAL_SPLITS = ("val2017", "val", "validation", "valid", "test")


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
        split: split of the folder; default: the first of val2017, val, validation, valid and test.

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
    found = _list_splits(path)
    if not found:
        raise UsageError(f"expected a COCO file or a folder with annotations/{_PREFIX}SPLIT.json, got {path}")
    chosen = split if split is not None else next((name for name in _VAL_SPLITS if name in found), None)
    if chosen not in found:
        expected = "one of " + ", ".join(_VAL_SPLITS) if chosen is None else repr(chosen)
        raise UsageError(f"expected a split {expected} in {path}, found {', '.join(found)}")
    file, folder = coco_paths(path, chosen)
    return file, Path(images or folder)


def _list_splits(folder: Path) -> list[str]:
    return sorted(file.stem.removeprefix(_PREFIX) for file in folder.glob(f"annotations/{_PREFIX}*.json"))
