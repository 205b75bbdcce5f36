"""From labels as they stand in lists and shards to class names and class numbers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lightspine.errors import LightspineError, UsageError


def read_class_names(path: str | Path) -> list[str]:
    """Read a text file with one class name per line, in the order of the class numbers.

    Raises:
        UsageError: the file is missing, has no name or one name twice.
        LightspineError: the file is not text.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"expected a file of class names, but {path} is not a file")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LightspineError(f"cannot read class names {path}: {error}") from error
    if not names:
        raise UsageError(f"expected one class name per line in {path}, which is empty")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UsageError(f"class name {name!r} stands twice in {path}")
        seen.add(name)
    return names


def derive_class_names(labels: Iterable[str]) -> list[str]:
    """Return the class names that labels imply.

    Labels that are all whole numbers are class numbers, named "0" to the largest; others are names, sorted.
    """
    distinct = set(labels)
    if all(label.isdecimal() for label in distinct):
        return [str(number) for number in range(max(map(int, distinct), default=-1) + 1)]
    return sorted(distinct)


def number_labels(labels: Sequence[str], class_names: Sequence[str], where: str) -> np.ndarray:
    """Return the class number of every label, (labels,) int64.

    A label is one of the names; one that is not may be a class number.

    Args:
        labels: as they stand in the data.
        class_names: in the order of the class numbers.
        where: what an error calls the data.

    Raises:
        UsageError: a label is neither a name nor a number below the count of the classes.
    """
    numbers = {str(number): number for number in range(len(class_names))}
    numbers |= {name: number for number, name in enumerate(class_names)}
    try:
        return np.fromiter((numbers[label] for label in labels), dtype=np.int64, count=len(labels))
    except KeyError as error:
        raise UsageError(
            f"label {error.args[0]!r} of {where} is not among the {len(class_names)} classes"
        ) from error


def check_class_count(class_names: Sequence[str], where: str) -> None:
    """Refuse fewer than two classes.

    Raises:
        UsageError: there are none or one.
    """
    if len(class_names) < 2:
        raise UsageError(f"expected at least two classes in {where}, found {len(class_names)}")
