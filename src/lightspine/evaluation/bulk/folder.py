"""The folder of a run: what it was asked for, the parts that are done, and the outcome."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.bulk.formats import Csv, Format
from lightspine.evaluation.bulk.outputs import Table
from lightspine.utils.files import atomic_write_text

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
