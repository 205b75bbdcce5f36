"""Measurement table of a benchmark report: columns and cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lightspine.benchmark.report.conditions import (
    MODES,
    count_pixels,
    format_number,
    format_published,
    format_size,
    format_status,
)
from lightspine.benchmark.results import Row

MEASURED, PUBLISHED = "measured here", "published"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table cell.

    Attributes:
        text: displayed text.
        sort: sort key: the exact number, or the text.
        exact: the number with all digits, shown as a tooltip.
        bad: whether the cell reports a failure.
    """

    text: str
    sort: str
    exact: str = ""
    bad: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table column.

    Attributes:
        name: heading.
        group: heading of its group.
        numeric: whether it is sorted and aligned as numbers.
        cell: returns the cell of a row, `None` if the row has no value.
        condition: whether it is a condition, which moves above the table if it is equal in all rows.
    """

    name: str
    group: str
    numeric: bool
    cell: Callable[[Row], Cell | None]
    condition: bool = False

    @property
    def css(self) -> str:
        """CSS classes of its cells."""
        return " ".join(["number"] * self.numeric + ["published"] * (self.group == PUBLISHED))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for the page.

    Attributes:
        columns: the columns with at least one value.
        groups: heading and number of columns of each group.
        lines: model, note and cells of each row; `None` for an empty cell.
        common: the conditions that all rows share.
    """

    columns: list[Column]
    groups: list[tuple[str, int]]
    lines: list[tuple[str, str | None, list[Cell | None]]]
    common: str


def measurement_table(rows: Sequence[Row]) -> Table:
    """Return the table of all rows, without empty columns and constant conditions."""
    columns, common = [], []
    for column in _COLUMNS:
        texts = {cell.text for row in rows if (cell := column.cell(row))}
        if len(texts) == 1 and column.condition:
            common.append(f"{column.name} {texts.pop()}")
        elif texts:
            columns.append(column)
    return Table(
        columns=columns,
        groups=[(group, len(list(members))) for group, members in groupby(columns, lambda c: c.group)],
        lines=[(row.model, row.note, [column.cell(row) for column in columns]) for row in rows],
        common=", ".join(common),
    )


def _text_cell(value: str | None, *, bad: bool = False) -> Cell | None:
    return Cell(text=value, sort=value, bad=bad) if value else None


def _condition(
    name: str, value: Callable[[Row], Any], sort: Callable[[Row], Any] | None = None, *, numeric: bool = False
) -> Column:
    # An absent row was never run and has no conditions.
    def cell(row: Row) -> Cell | None:
        return None if row.status == "absent" else Cell(text=str(value(row)), sort=str((sort or value)(row)))

    return Column(name=name, group="", numeric=numeric, cell=cell, condition=True)


def _measured(name: str, value: Callable[[Row], float | None], *, scale: float = 1.0) -> Column:
    def cell(row: Row) -> Cell | None:
        number = value(row)
        if number is None:
            return None
        text = f"{number:,}" if isinstance(number, int) and scale == 1 else format_number(number / scale, 4)
        return Cell(text=text, sort=repr(number), exact=repr(number / scale if scale != 1 else number))

    return Column(name=name, group=MEASURED, numeric=True, cell=cell)


def _timing(call: str, field: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(getattr(row, call), field, None)


def _published(name: str, field: str) -> Column:
    def cell(row: Row) -> Cell | None:
        value = getattr(row.published, field, None)
        if isinstance(value, float | int):
            return Cell(text=format_published(value), sort=repr(value))
        return _text_cell(value)

    return Column(name=name, group=PUBLISHED, numeric=field not in ("throughput_device", "source"), cell=cell)


def _status_cell(row: Row) -> Cell | None:
    return _text_cell(format_status(row), bad=row.status != "ok")


# Measured and published values of a quantity are in adjacent columns.
_COLUMNS = (
    Column(name="library", group="", numeric=False, cell=lambda row: _text_cell(row.source)),
    Column(name="variant", group="", numeric=False, cell=lambda row: _text_cell(row.variant)),
    _condition("mode", lambda row: row.mode, lambda row: MODES.index(row.mode)),
    _condition("batch", lambda row: row.batch, numeric=True),
    _condition("size", format_size, count_pixels, numeric=True),
    _condition("device", lambda row: row.device),
    _condition("dtype", lambda row: row.dtype),
    _condition("threads", lambda row: row.threads, numeric=True),
    Column(name="status", group="", numeric=False, cell=_status_cell, condition=True),
    _published("top-1 %", "top1"),
    _measured("median ms", _timing("forward", "median_ms")),
    _measured("p90 ms", _timing("forward", "p90_ms")),
    _measured("p99 ms", _timing("forward", "p99_ms")),
    _measured("images/s", _timing("forward", "images_per_s")),
    _measured("first call s", _timing("forward", "first_call_s")),
    _published("images/s", "throughput"),
    _published("measured on", "throughput_device"),
    _measured("parameters", lambda row: row.parameters),
    _published("parameters, M", "params_m"),
    _measured("GMACs", lambda row: row.macs, scale=1e9),
    _measured("GMACs of scans", lambda row: row.macs_scan, scale=1e9),
    _published("GMACs", "macs_g"),
    _measured("memory MiB", lambda row: row.peak_memory_mib),
    _measured("training step ms", _timing("train_step", "median_ms")),
    _measured("training p90 ms", _timing("train_step", "p90_ms")),
    _measured("training images/s", _timing("train_step", "images_per_s")),
    _measured("training first call s", _timing("train_step", "first_call_s")),
    _measured("training memory MiB", lambda row: row.train_memory_mib),
    _measured("ONNX file MiB", lambda row: row.onnx_file_bytes, scale=2**20),
    _measured("GFLOP/s", lambda row: row.gflops_per_s),
    _measured("% of matrix product", lambda row: row.matmul_share, scale=0.01),
    _measured("timed calls", _timing("forward", "repeats")),
    _published("source", "source"),
)
