"""The files that rows are written to: a part while a run goes on, and one for all at its end."""

import csv
import importlib.util
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightspine.errors import UsageError
from lightspine.evaluation.bulk.outputs import Table
from lightspine.utils.files import atomic_write, atomic_write_text


class Format(Protocol):
    """How parts are written and joined.

    Attributes:
        suffix: of a part and of the file of all rows.
    """

    suffix: str

    def write_part(self, part: Path, paths: Sequence[str], table: Table | None) -> None:
        """Write the rows of neighbouring images; `table` is None where there is none."""

    def join(self, parts: Sequence[Path], target: Path) -> None:
        """Write the rows of all parts, in order, to one file."""


class Csv:
    """Text with a head; a column must have a number or a text per image."""

    suffix = ".csv"

    def write_part(self, part: Path, paths: Sequence[str], table: Table | None) -> None:
        """Write the rows of neighbouring images, without a head where there is no row."""
        columns = table or {}
        rows = [] if table is None else [("path", *columns)]
        rows += zip(paths, *(map(_as_text, column.tolist()) for column in columns.values()), strict=True)
        atomic_write_text(part, _as_csv(rows))

    def join(self, parts: Sequence[Path], target: Path, *, head: str = "path") -> None:
        """Write one head, that of the parts or `head` where none has a row, and the rows of all parts."""
        with atomic_write(target) as joined:
            begun = False
            for part in parts:
                with part.open("rb") as file:
                    first = file.readline()
                    if not begun:
                        joined.write(first)
                        begun = bool(first)
                    shutil.copyfileobj(file, joined)
            if not begun:
                joined.write(f"{head}\n".encode())


class Npy(Csv):
    """An array file per part and column in `features`, and a CSV that tells the row of every image.

    `index.csv` has the columns path, part and row: the features of an image are row `row` of
    `features/COLUMN-PART.npy`.
    """

    def write_part(self, part: Path, paths: Sequence[str], table: Table | None) -> None:
        """Write the arrays, and then the index that says that they are whole."""
        number = part.stem
        for name, column in (table or {}).items():
            with atomic_write(part.parent.parent / "features" / f"{name}-{number}.npy") as file:
                np.save(file, column)
        count = len(paths)
        index = {"part": np.full(count, number, dtype=object), "row": np.arange(count)}
        super().write_part(part, paths, index if table else None)


class Parquet:
    """Columns, with a list of fixed length per image for a vector; written by pyarrow.

    Raises:
        UsageError: pyarrow is not installed.
    """

    suffix = ".parquet"

    def __init__(self) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UsageError("expected the package pyarrow for Parquet files, but it is not installed")

    def write_part(self, part: Path, paths: Sequence[str], table: Table | None) -> None:
        """Write the rows of neighbouring images, and an empty file where there is none."""
        if table is None:
            atomic_write_text(part, "")
            return
        import pyarrow
        from pyarrow import parquet

        columns = {"path": pyarrow.array([_as_unicode(path) for path in paths])} | {
            name: _as_arrow(pyarrow, column) for name, column in table.items()
        }
        with atomic_write(part) as file:
            parquet.write_table(pyarrow.table(columns), file)

    def join(self, parts: Sequence[Path], target: Path) -> None:
        """Write the rows of all parts, a group of rows per part; one part is in memory at a time."""
        import pyarrow
        from pyarrow import parquet

        filled = [part for part in parts if part.stat().st_size]
        schema = parquet.read_schema(filled[0]) if filled else pyarrow.schema([("path", pyarrow.string())])
        with atomic_write(target) as file, parquet.ParquetWriter(file, schema) as writer:
            for part in filled:
                writer.write_table(parquet.read_table(part))


def find_format(name: str, known: dict[str, type]) -> Format:
    """Return a format by its name.

    Raises:
        UsageError: an unknown name, or what the format needs is not installed.
    """
    if name not in known:
        raise UsageError(f"expected a format of {', '.join(known)}, got {name!r}")
    return known[name]()


def _as_arrow(pyarrow: Any, column: np.ndarray) -> Any:
    if column.ndim == 1:
        return pyarrow.array(column.tolist() if column.dtype == object else column)
    values = pyarrow.array(np.ascontiguousarray(column).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(values, column[0].size)


def _as_unicode(path: str) -> str:
    # Names of files may be any bytes, texts in Parquet may not.
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _as_text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _as_csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
