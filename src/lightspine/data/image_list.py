"""Image lists: CSV and TSV files with paths and labels."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightspine.data.class_names import (
    check_class_count,
    encode_labels,
    infer_class_names,
    read_class_names,
)
from lightspine.data.image_folder import FolderSplits, Sample, train_val_split
from lightspine.data.split_names import TRAIN_SPLITS, VAL_SPLITS, find_split
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import path_from_text

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COLUMNS = ("path", "label", "split")
_CHECKED_IMAGES = 10


@dataclass(frozen=True)
class ListedImage:
    """One row: path, label as written, and split if the list has one."""

    path: Path
    label: str
    split: str | None


def read_image_list(file: str | Path, *, root: str | Path | None = None) -> list[ListedImage]:
    """Read the rows of an image list.

    Args:
        file: `.csv` (commas) or `.tsv` (tabs) with the columns path, label and optionally split. If the first
            row contains "path" and "label" it is the header; other columns are then ignored.
        root: folder of relative paths; default: the folder of the list.

    Raises:
        UsageError: the file is missing, empty, of another type or has a row with a wrong number of columns;
            none of the first ten images exists.
        LightspineError: the file is not text.
    """
    file = Path(file)
    if file.suffix.lower() not in _DELIMITERS:
        raise UsageError(f"expected a list that ends in .csv or .tsv, got {file}")
    if not file.is_file():
        raise UsageError(f"expected a list of images, but {file} is not a file")
    base = file.parent if root is None else Path(root)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=_DELIMITERS[file.suffix.lower()], strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LightspineError(f"cannot read the list {file}: {error}") from error
    columns, rows = _find_columns(rows)
    images = [_read_row(file, base, line, row, columns) for line, row in rows]
    if not images:
        raise UsageError(f"expected at least one image in the list {file}")
    # Catches a wrong root; single missing files are handled as unreadable images.
    if not any(image.path.is_file() for image in images[:_CHECKED_IMAGES]):
        raise UsageError(f"none of the first images of {file} exists, such as {images[0].path}")
    return images


def split_image_list(
    file: str | Path,
    *,
    root: str | Path | None = None,
    class_names: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    val_split: str | None = None,
) -> FolderSplits:
    """Read an image list and split it into training and validation.

    Args:
        file: see `read_image_list`.
        root: folder of relative paths; default: the folder of the list.
        class_names: file with one class name per line; default: see `infer_class_names`.
        val_fraction: share of every class for validation if the list has no splits.
        seed: seed of the split.
        val_split: name of the validation split; default: the first of val, validation, valid, test and
            testing that the list has. The names may be written in any case.

    Raises:
        UsageError: see `read_image_list`; a missing split, an unknown label, a class with too few images to
            be split.
        LightspineError: a file cannot be read.
    """
    images = read_image_list(file, root=root)
    names = read_class_names(class_names) if class_names else infer_class_names(i.label for i in images)
    check_class_count(names, str(file))
    numbers = encode_labels([image.label for image in images], names, str(file)).tolist()
    samples = [Sample(image.path, number) for image, number in zip(images, numbers, strict=True)]
    found = sorted({image.split for image in images if image.split})
    if not found:
        if val_split is not None:
            raise UsageError(f"expected images of the split {val_split} in {file}, which has no split column")
        return FolderSplits(names, *train_val_split(names, samples, val_fraction, seed))
    chosen = []
    for names_of_split in (TRAIN_SPLITS, VAL_SPLITS if val_split is None else (val_split,)):
        name = find_split(found, names_of_split, file)
        if name is None:
            raise UsageError(
                f"expected images of the split {names_of_split[0]} in {file}, which has {', '.join(found)}"
            )
        chosen.append([sample for sample, image in zip(samples, images, strict=True) if image.split == name])
    train, val = chosen
    check_class_count([names[number] for number in sorted({sample.label for sample in train})], str(file))
    return FolderSplits(names, train, val)


def _find_columns(rows: list[tuple[int, list[str]]]) -> tuple[Sequence[str], list[tuple[int, list[str]]]]:
    """Return the column names, and the rows without the header."""
    head = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if {"path", "label"} <= set(head):
        return head, rows[1:]
    return _COLUMNS[: max(len(head), 2)], rows


def _read_row(file: Path, base: Path, line: int, row: list[str], columns: Sequence[str]) -> ListedImage:
    if len(row) != len(columns) or len(set(columns)) != len(columns):
        raise UsageError(f"expected the columns {', '.join(columns)} in line {line} of {file}, got {row}")
    cells = dict(zip(columns, (cell.strip() for cell in row), strict=True))
    if not cells["path"] or not cells["label"]:
        raise UsageError(f"expected a path and a label in line {line} of {file}, got {row}")
    return ListedImage(base / path_from_text(cells["path"]), cells["label"], cells.get("split") or None)
