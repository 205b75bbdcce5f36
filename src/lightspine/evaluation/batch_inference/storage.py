"""Output formats and the resumable output folder of batch inference."""

import csv
import importlib.util
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.batch_inference.outputs import Table
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
            raise UsageError(
                "expected the package pyarrow for Parquet files, but it is not installed: "
                "pip install 'lightspine[parquet]'"
            )

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


BAD_IMAGES = "bad_images.csv"


class RunFolder:
    """Keeps a run on the disk, so that it can be killed at any moment and taken up again.

    While the run goes on, `parts` holds the settings, the listing of the images and a file per part. A part's
    file appears whole, and after everything else that belongs to the part. At the end the parts are joined,
    `run.json` says what was done, and `parts` is removed.

    Args:
        path: the folder.
        name: of the file of all rows, without its suffix.
        rows: how rows are written.
    """

    def __init__(self, path: str | Path, name: str, rows: Format) -> None:
        self.path = Path(path)
        self.rows = rows
        self.parts = self.path / "parts"
        self.target = self.path / f"{name}{rows.suffix}"

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What a finished run wrote to `run.json`; None before."""
        return self._read(self.path / "run.json")

    @property
    def begun(self) -> dict[str, Any] | None:
        """What an unfinished run was asked for; None where none has begun."""
        return self._read(self.parts / "settings.json")

    def check(self, resume: bool) -> None:
        """Refuse a folder with another run.

        Raises:
            UsageError: there is a run, and it is not to be resumed; or the folder is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"expected a folder, but {self.path} is a file")
        if resume:
            return
        if self.outcome is not None:
            raise UsageError(f"expected a new folder, but {self.path} holds a finished run")
        if self.begun is not None:
            raise UsageError(
                f"expected a new folder, but {self.path} holds an unfinished run: resume it or remove it"
            )
        if self.target.exists():
            raise UsageError(f"expected a new folder, but {self.target} exists")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note what is asked for, or compare it with what was.

        Raises:
            UsageError: the run to resume was asked for something else.
            LightspineError: the settings cannot be written.
        """
        outcome = self.outcome
        known: dict[str, Any] | None = self.begun if outcome is None else outcome["settings"]
        # As JSON gives it back: tuples are lists there.
        asked: dict[str, Any] = json.loads(json.dumps(settings))
        if known is None:
            atomic_write_text(self.parts / "settings.json", json.dumps(asked, indent=2) + "\n")
            return
        for key, value in asked.items():
            if known.get(key) != value:
                raise UsageError(
                    f"the run in {self.path} has {key} {known.get(key)}, got {value}: "
                    "resume it with the same settings or give another folder"
                )

    def pending(self, parts: int) -> list[int]:
        """Return the numbers of the parts that are not done, of 0 to `parts` - 1."""
        done = {file.name for file in self.parts.glob(f"*{self.rows.suffix}")}
        return [number for number in range(parts) if self._part(number).name not in done]

    def write_part(
        self, number: int, paths: Sequence[str], table: Table | None, bad: Sequence[tuple[str, str]]
    ) -> None:
        """Write the rows of a part, and the path and reason of its bad images.

        Raises:
            LightspineError: a file cannot be written.
        """
        if bad:
            columns = list(zip(*bad, strict=True))
            reasons = np.array(columns[1], dtype=object)
            Csv().write_part(self._bad(number), columns[0], {"reason": reasons})
        else:
            # Of an earlier attempt at this part.
            self._bad(number).unlink(missing_ok=True)
        self.rows.write_part(self._part(number), paths, table)

    def finish(self, parts: int, outcome: Mapping[str, Any]) -> None:
        """Join all parts, write `run.json` with the count of bad images too, and remove the parts.

        Raises:
            LightspineError: a part is missing, or a file cannot be written.
        """
        if missing := self.pending(parts):
            raise LightspineError(f"expected {parts} parts in {self.parts}, but part {missing[0]} is missing")
        # Files that a kill left half written; nobody writes any more.
        for leftover in self.path.rglob(".*.part"):
            leftover.unlink(missing_ok=True)
        Csv().join(
            [self._bad(number) for number in range(parts) if self._bad(number).is_file()],
            self.path / BAD_IMAGES,
            head="path,reason",
        )
        self.rows.join([self._part(number) for number in range(parts)], self.target)
        found = {"bad": _count_rows(self.path / BAD_IMAGES)}
        atomic_write_text(self.path / "run.json", json.dumps({**outcome, **found}, indent=2) + "\n")
        self.tidy()

    def tidy(self) -> None:
        """Remove what a finished run kept on its way."""
        if self.parts.is_dir():
            shutil.rmtree(self.parts)

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}{self.rows.suffix}"

    def _bad(self, number: int) -> Path:
        return self.parts / f"{number:06d}.bad"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise LightspineError(f"cannot read {path}: {error}") from error


def _count_rows(file: Path) -> int:
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        return sum(1 for _ in csv.reader(lines)) - 1
