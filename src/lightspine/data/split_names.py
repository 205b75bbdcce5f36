"""Names of the training and validation splits, in folders and columns."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightspine.errors import UsageError
from lightspine.utils.image_files import list_folders

TRAIN_SPLITS = ("train", "training")
"""Names of the training split, in order of preference."""

VAL_SPLITS = ("val", "validation", "valid", "test", "testing")
"""Names of the validation split, in order of preference."""

_WORDS = frozenset({*TRAIN_SPLITS, *VAL_SPLITS, "dev", "eval", "evaluation", "holdout", "trainval"})


def find_split(found: Iterable[str], names: Sequence[str], where: str | Path) -> str | None:
    """Return the first of `names` that is among the found names, as it is written there, in any case.

    Args:
        found: names of folders or splits.
        names: names of the split to look for, in order of preference.
        where: the dataset in the error message.

    Raises:
        UsageError: two of the found names differ only in case.
    """
    found = list(found)
    for name in names:
        matches = sorted(other for other in found if other.lower() == name.lower())
        if name in matches:
            return name
        if len(matches) > 1:
            raise UsageError(f"expected one split {name} in {where}, found {' and '.join(matches)}")
        if matches:
            return matches[0]
    return None


def find_split_folder(root: str | Path, names: Sequence[str]) -> Path | None:
    """Return the first sub-folder of `root` with one of the names, in any case; see `find_split`."""
    root = Path(root)
    name = find_split(list_folders(root), names, root) if root.is_dir() else None
    return None if name is None else root / name


def looks_like_split(name: str) -> bool:
    """Return whether a folder name contains the name of a split, such as `training_set` or `Val2017`."""
    return any(word in _WORDS for word in re.findall("[a-z]+", name.lower()))
