"""Locate COCO annotation files and their images."""

from pathlib import Path

from lightspine.errors import UsageError

_PREFIX = "instances_"
_SPLITS = ("val2017", "val", "validation", "valid", "test")


def is_coco(data: str | Path) -> bool:
    """Tell whether a path is a COCO file or a folder with some."""
    path = Path(data)
    return path.suffix == ".json" or any(path.glob(f"annotations/{_PREFIX}*.json"))


def find_coco(
    data: str | Path, images: str | Path | None = None, split: str | None = None
) -> tuple[Path, Path]:
    """Return the COCO file and the folder of its images.

    Args:
        data: the file, or a folder with `annotations/instances_SPLIT.json` and the images in `SPLIT/`.
        images: the folder of the images, where they lie elsewhere.
        split: which one of the folder; by default the first of val2017, val, validation, valid and test.

    Raises:
        UsageError: the folder has no such split, or the images' folder cannot be told.
    """
    path = Path(data)
    if path.suffix == ".json":
        if split is not None:
            raise UsageError(f"expected no split besides the file {path}, got {split!r}")
        if images is not None:
            return path, Path(images)
        folder = path.parent.parent / path.stem.removeprefix(_PREFIX)
        if not folder.is_dir():
            raise UsageError(f"expected the images of {path} in {folder}, which is no folder: give --images")
        return path, folder
    found = sorted(file.stem.removeprefix(_PREFIX) for file in path.glob(f"annotations/{_PREFIX}*.json"))
    if not found:
        raise UsageError(f"expected a COCO file or a folder with annotations/{_PREFIX}SPLIT.json, got {path}")
    chosen = split if split is not None else next((name for name in _SPLITS if name in found), None)
    if chosen not in found:
        wanted = "one of " + ", ".join(_SPLITS) if chosen is None else repr(chosen)
        raise UsageError(f"expected a split {wanted} in {path}, found {', '.join(found)}")
    return path / "annotations" / f"{_PREFIX}{chosen}.json", Path(images or path / chosen)
