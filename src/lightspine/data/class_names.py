"""Class names: read them from a file, infer them from labels, and convert labels to class indices."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lightspine.errors import LightspineError, UsageError


def read_class_names(path: str | Path) -> list[str]:
    """Read a text file with one class name per line, in the order of the class indices.

    Raises:
        UsageError: the file is missing or empty, or a name appears twice.
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
            raise UsageError(f"class name {name!r} appears twice in {path}")
        seen.add(name)
    return names


def find_class(name: str, class_names: Sequence[str]) -> list[int]:
    """Return the classes of a name, or the only class whose name differs in case or outer spaces.

    Several classes of one name, as in older checkpoints, are all returned.
    """
    exact = [label for label, other in enumerate(class_names) if other == name]
    if exact:
        return exact
    folded = name.strip().casefold()
    similar = [label for label, other in enumerate(class_names) if other.strip().casefold() == folded]
    return similar if len(similar) == 1 else []


def similar_class_names(class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups of class names that differ only in case, which are often one class by mistake."""
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault(name.strip().casefold(), []).append(name)
    return [tuple(names) for names in groups.values() if len(set(names)) > 1]


def infer_class_names(labels: Iterable[str]) -> list[str]:
    """Infer the class names from labels.

    If all labels are whole numbers they are class indices, and the names are "0" up to the largest one.
    Otherwise the names are the sorted labels.
    """
    distinct = set(labels)
    if all(label.isdecimal() for label in distinct):
        return [str(number) for number in range(max(map(int, distinct), default=-1) + 1)]
    return sorted(distinct)


def encode_labels(labels: Sequence[str], class_names: Sequence[str], where: str) -> np.ndarray:
    """Convert labels to class indices, (labels,) int64.

    A label is a class name or, if it is not among the names, a class index.

    Args:
        labels: labels as written in the data.
        class_names: names in the order of the class indices.
        where: name of the data in error messages.

    Raises:
        UsageError: a label is neither a class name nor an index below the number of classes.
    """
    indices = {str(number): number for number in range(len(class_names))}
    indices |= {name: number for number, name in enumerate(class_names)}
    try:
        return np.fromiter((indices[label] for label in labels), dtype=np.int64, count=len(labels))
    except KeyError as error:
        raise UsageError(
            f"label {error.args[0]!r} of {where} is not among the {len(class_names)} classes"
        ) from error


def check_class_count(class_names: Sequence[str], where: str) -> None:
    """Check that there are at least two classes.

    Raises:
        UsageError: there are none or one.
    """
    if len(class_names) < 2:
        raise UsageError(f"expected at least two classes in {where}, found {len(class_names)}")
