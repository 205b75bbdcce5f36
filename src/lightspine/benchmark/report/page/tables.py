"""The tables of a report: which columns there are, and what stands in them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.benchmark.report.conditions import MODES, size_of, status_in_words
from lightspine.benchmark.report.numbers import number, plain
from lightspine.benchmark.results import PublishedFigures, Row

MEASURED, PUBLISHED = "measured here", "published"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What stands in a table.

    Attributes:
        text: as it is read.
        sort: as it is sorted: the exact number, or the text; empty cells stand last.
        exact: the number of the file in full, shown when the cell is pointed at.
        bad: whether it tells of a failure.
    """

    text: str
    sort: str
    exact: str = ""
    bad: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column.

    Attributes:
        name: its heading.
        group: heading of its group.
        numeric: whether it is sorted and aligned as numbers.
        cell: of a row; `None` where the row has nothing.
        always: whether it stays where all rows have the same.
    """

    name: str
    group: str
    numeric: bool
    cell: Callable[[Row], Cell | None]
    always: bool = False

    @property
    def css(self) -> str:
        """Classes of its cells."""
        return " ".join(["number"] * self.numeric + ["published"] * (self.group == PUBLISHED))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that the page can draw.

    Attributes:
        columns: that have something to say.
        groups: heading and width of each group of columns.
        lines: name and note of each row, and its cells, `None` for an empty one.
        common: what is the same in every row and therefore has no column.
    """

    columns: list[Column]
    groups: list[tuple[str, int]]
    lines: list[tuple[str, str | None, list[Cell | None]]]
    common: str


def measurements_table(rows: Sequence[Row]) -> Table:
    """Return the table of all rows; empty columns are left out, and so are conditions that never vary."""
    columns, common = [], []
    for column in _COLUMNS:
        # What is absent was never run under any conditions and has no cell for them.
        texts = {cell.text for row in rows if (cell := column.cell(row))}
        if len(texts) == 1 and column.group == "" and not column.always:
            common.append(f"{column.name} {texts.pop()}")
        elif texts:
            columns.append(column)
    groups: list[tuple[str, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    lines = [(row.model, row.note, [column.cell(row) for column in columns]) for row in rows]
    return Table(columns=columns, groups=groups, lines=lines, common=", ".join(common))


def _text(value: str | None, *, bad: bool = False) -> Cell | None:
    return Cell(text=value, sort=value, bad=bad) if value else None


def _whole(value: int | None) -> Cell | None:
    return None if value is None else Cell(text=f"{value:,}", sort=repr(value))


def _figure(value: float | None, *, scale: float = 1.0, digits: int = 4) -> Cell | None:
    if value is None:
        return None
    return Cell(text=number(value / scale, digits), sort=repr(value), exact=repr(value))


def _as_published(value: float | None) -> Cell | None:
    return None if value is None else Cell(text=plain(value), sort=repr(value))


def _share(value: float | None) -> Cell | None:
    return None if value is None else Cell(text=f"{100 * value:.1f} %", sort=repr(value), exact=repr(value))


def _size(row: Row) -> Cell | None:
    return None if row.status == "absent" else Cell(text=size_of(row), sort=repr(row.height * row.width))


def _condition(value: Callable[[Row], str | int]) -> Callable[[Row], Cell | None]:
    def cell(row: Row) -> Cell | None:
        return None if row.status == "absent" else Cell(text=str(value(row)), sort=str(value(row)))

    return cell


def _mode(row: Row) -> Cell | None:
    return None if row.status == "absent" else Cell(text=row.mode, sort=f"{MODES.index(row.mode)}")


def _status(row: Row) -> Cell | None:
    return _text(status_in_words(row), bad=row.status != "ok")


def _measured(name: str, cell: Callable[[Row], Cell | None]) -> Column:
    return Column(name=name, group=MEASURED, numeric=True, cell=cell)


def _published(name: str, cell: Callable[[PublishedFigures], Cell | None], *, numeric: bool = True) -> Column:
    return Column(
        name=name,
        group=PUBLISHED,
        numeric=numeric,
        cell=lambda row: cell(row.published) if row.published else None,
    )


def _forward(of: Callable[[Timing], Cell | None]) -> Callable[[Row], Cell | None]:
    return lambda row: of(row.forward) if row.forward else None


def _training(of: Callable[[Timing], Cell | None]) -> Callable[[Row], Cell | None]:
    return lambda row: of(row.train_step) if row.train_step else None


# What is measured and what is published of the same thing stand side by side.
_COLUMNS = (
    Column(name="from", group="", numeric=False, cell=lambda row: _text(row.source), always=True),
    Column(name="step", group="", numeric=False, cell=lambda row: _text(row.variant), always=True),
    Column(name="mode", group="", numeric=False, cell=_mode),
    Column(name="batch", group="", numeric=True, cell=_condition(lambda row: row.batch)),
    Column(name="size", group="", numeric=True, cell=_size),
    Column(name="device", group="", numeric=False, cell=_condition(lambda row: row.device)),
    Column(name="dtype", group="", numeric=False, cell=_condition(lambda row: row.dtype)),
    Column(name="threads", group="", numeric=True, cell=_condition(lambda row: row.threads)),
    Column(name="status", group="", numeric=False, cell=_status),
    _published("top-1 %", lambda known: _as_published(known.top1)),
    _measured("median ms", _forward(lambda time: _figure(time.median_ms))),
    _measured("p90 ms", _forward(lambda time: _figure(time.p90_ms))),
    _measured("images/s", _forward(lambda time: _figure(time.images_per_s))),
    _published("images/s", lambda known: _as_published(known.throughput)),
    _published("measured on", lambda known: _text(known.throughput_device), numeric=False),
    _measured("parameters", lambda row: _whole(row.parameters)),
    _published("parameters, M", lambda known: _as_published(known.params_m)),
    _measured("GMACs", lambda row: _figure(row.macs, scale=1e9)),
    _measured("of these in scans", lambda row: _figure(row.macs_scan, scale=1e9)),
    _published("GMACs", lambda known: _as_published(known.macs_g)),
    _measured("memory MiB", lambda row: _figure(row.peak_memory_mib)),
    _measured("training step ms", _training(lambda time: _figure(time.median_ms))),
    _measured("training p90 ms", _training(lambda time: _figure(time.p90_ms))),
    _measured("training images/s", _training(lambda time: _figure(time.images_per_s))),
    _measured("training memory MiB", lambda row: _figure(row.train_memory_mib)),
    _measured("GFLOP/s", lambda row: _figure(row.gflops_per_s)),
    _measured("of matrix rate", lambda row: _share(row.matmul_share)),
    _measured("timed calls", _forward(lambda time: _whole(time.repeats))),
    _published("printed in", lambda known: _text(known.source), numeric=False),
)
