"""Output files of batch inference (CSV, NumPy, Parquet): one per finished part, concatenated at the end."""

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
from lightspine.utils.files import atomic_write, atomic_write_text, parse_json
from lightspine.utils.printable import printable

BAD_IMAGES = "bad_images.csv"


class Format(Protocol):
    """Interface of the output file formats.

    Attributes:
        suffix: file name suffix of a part and of the final file.
    """

    suffix: str

    def write_part(self, part: Path, paths: Sequence[str], table: Table | None) -> None:
        """Write the rows of one part; `table` is None for a part without rows."""

    def join(self, parts: Sequence[Path], target: Path) -> None:
        """Concatenate the parts, in order, into one file."""


class Csv:
    """CSV with a header; every column has one number or text per image. Control characters are escaped."""

    suffix = ".csv"

    def write_part(self, part: Path, paths: Sequence[str], table: Table | None) -> None:
        """Write a header and the rows of one part, or an empty file for a part without rows."""
        columns = table or {}
        rows: list[Sequence[Any]] = [] if table is None else [("path", *columns)]
        rows += zip(
            map(printable, paths),
            *(map(_format_value, column.tolist()) for column in columns.values()),
            strict=True,
        )
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        atomic_write_text(part, text.getvalue())

    def join(self, parts: Sequence[Path], target: Path, *, header: str = "path") -> None:
        """Write the header of the parts, or `header` if no part has rows, and the rows of all parts."""
        with atomic_write(target) as joined:
            header_written = False
            for part in parts:
                with part.open("rb") as file:
                    first = file.readline()
                    if not header_written:
                        joined.write(first)
                        header_written = bool(first)
                    shutil.copyfileobj(file, joined)
            if not header_written:
                joined.write(f"{header}\n".encode())


class Npy(Csv):
    """One `.npy` file per part and column in `features`, and `index.csv` with the row of every image.

    The columns of `index.csv` are path, part and row: the features of an image are row `row` of
    `features/COLUMN-PART.npy`.
    """

    def write_part(self, part: Path, paths: Sequence[str], table: Table | None) -> None:
        """Write the arrays, then the index rows, whose presence marks the part as complete."""
        number = part.stem
        for name, column in (table or {}).items():
            with atomic_write(part.parent.parent / "features" / f"{name}-{number}.npy") as file:
                np.save(file, column)
        count = len(paths)
        index = {"part": np.full(count, number, dtype=object), "row": np.arange(count)}
        super().write_part(part, paths, index if table else None)


class Parquet:
    """Parquet; vectors are fixed-size lists.

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
        """Write the rows of one part, or an empty file for a part without rows."""
        if table is None:
            atomic_write_text(part, "")
            return
        import pyarrow
        from pyarrow import parquet

        # File names may contain any bytes, Parquet strings only Unicode.
        readable = [path.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for path in paths]
        columns = {"path": pyarrow.array(readable)} | {
            name: _to_arrow(pyarrow, column) for name, column in table.items()
        }
        with atomic_write(part) as file:
            parquet.write_table(pyarrow.table(columns), file)

    def join(self, parts: Sequence[Path], target: Path) -> None:
        """Write one row group per part; one part is in memory at a time."""
        import pyarrow
        from pyarrow import parquet

        filled = [part for part in parts if part.stat().st_size]
        schema = parquet.read_schema(filled[0]) if filled else pyarrow.schema([("path", pyarrow.string())])
        with atomic_write(target) as file, parquet.ParquetWriter(file, schema) as writer:
            for part in filled:
                writer.write_table(parquet.read_table(part))


class RunFolder:
    """Output folder of a run that can be killed at any time and resumed.

    During the run, `parts` contains the settings, the image listing and one file per part, which is written
    atomically and last of all files of the part. At the end the parts are concatenated, `run.json` is written
    and `parts` is removed.

    Args:
        path: the folder.
        name: name of the final file without its suffix.
        rows: format of the rows.
    """

    def __init__(self, path: str | Path, name: str, rows: Format) -> None:
        self.path = Path(path)
        self.rows = rows
        self.parts = self.path / "parts"
        self.target = self.path / f"{name}{rows.suffix}"

    @property
    def outcome(self) -> dict[str, Any] | None:
        """Content of `run.json`; `None` for an unfinished run."""
        return _read_json(self.path / "run.json")

    @property
    def settings(self) -> dict[str, Any] | None:
        """Settings of an unfinished run; `None` if there is none."""
        return _read_json(self.parts / "settings.json")

    def check(self, resume: bool) -> None:
        """Check that the folder is new, unless a run is resumed.

        Raises:
            UsageError: the folder holds a run that is not resumed, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"expected a folder, but {self.path} is a file")
        if resume:
            return
        if self.outcome is not None:
            raise UsageError(f"expected a new folder, but {self.path} holds a finished run")
        if self.settings is not None:
            raise UsageError(
                f"expected a new folder, but {self.path} holds an unfinished run: resume it or remove it"
            )
        if self.target.exists():
            raise UsageError(f"expected a new folder, but {self.target} exists")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of a new run, or check them against those of the run to resume.

        Raises:
            UsageError: the run to resume has other settings.
            LightspineError: the settings cannot be written.
        """
        outcome = self.outcome
        known: dict[str, Any] | None = self.settings if outcome is None else outcome["settings"]
        # Round trip through JSON, which turns tuples into lists.
        given: dict[str, Any] = json.loads(json.dumps(settings))
        if self.parts.is_symlink():
            raise UsageError(f"expected a folder {self.parts}, but it is a link: remove it")
        if known is None:
            atomic_write_text(self.parts / "settings.json", json.dumps(given, indent=2) + "\n")
            return
        for key, value in given.items():
            if known.get(key) != value:
                raise UsageError(
                    f"the run in {self.path} has {key} {known.get(key)}, got {value}: "
                    "resume it with the same settings or give another folder"
                )

    def pending(self, parts: int) -> list[int]:
        """Return the numbers of the unfinished parts out of `parts`."""
        finished = {file.name for file in self.parts.glob(f"*{self.rows.suffix}")}
        return [number for number in range(parts) if self._part(number).name not in finished]

    def write_part(
        self, number: int, paths: Sequence[str], table: Table | None, bad: Sequence[tuple[str, str]]
    ) -> None:
        """Write the rows of a part, and the path and reason of its bad images.

        Raises:
            LightspineError: a file cannot be written.
        """
        if bad:
            bad_paths, reasons = zip(*bad, strict=True)
            Csv().write_part(self._bad(number), bad_paths, {"reason": np.array(reasons, dtype=object)})
        else:
            # May be left over from an interrupted attempt.
            self._bad(number).unlink(missing_ok=True)
        self.rows.write_part(self._part(number), paths, table)

    def finish(self, parts: int, outcome: Mapping[str, Any]) -> None:
        """Concatenate the parts, write `run.json` including the number of bad images, and remove the parts.

        Raises:
            LightspineError: a part is missing, or a file cannot be written.
        """
        if missing := self.pending(parts):
            raise LightspineError(f"expected {parts} parts in {self.parts}, but part {missing[0]} is missing")
        # Temporary files of killed processes; all ranks have finished writing.
        for leftover in self.path.rglob(".*.part"):
            leftover.unlink(missing_ok=True)
        bad_parts = [self._bad(number) for number in range(parts) if self._bad(number).is_file()]
        Csv().join(bad_parts, self.path / BAD_IMAGES, header="path,reason")
        self.rows.join([self._part(number) for number in range(parts)], self.target)
        record = {**outcome, "bad": _count_rows(self.path / BAD_IMAGES)}
        atomic_write_text(self.path / "run.json", json.dumps(record, indent=2) + "\n")
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove the intermediate files."""
        if self.parts.is_dir():
            shutil.rmtree(self.parts)

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}{self.rows.suffix}"

    def _bad(self, number: int) -> Path:
        return self.parts / f"{number:06d}.bad"


def _format_value(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(value) if isinstance(value, str) else value


def _to_arrow(pyarrow: Any, column: np.ndarray) -> Any:
    if column.ndim == 1:
        return pyarrow.array(column.tolist() if column.dtype == object else column)
    values = pyarrow.array(np.ascontiguousarray(column).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(values, column[0].size)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise LightspineError(f"cannot read {path}: {error}") from error


def _count_rows(file: Path) -> int:
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        return sum(1 for _ in csv.reader(lines)) - 1
