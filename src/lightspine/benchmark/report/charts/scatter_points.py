"""Which rows stand in a chart of accuracy against latency, and where."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lightspine.benchmark.report.conditions import family_of, grouped, is_ours, name_of, pixels_of, size_of
from lightspine.benchmark.report.numbers import number, plain
from lightspine.benchmark.results import Row

_USUAL_PIXELS = 224 * 224


class Timed(NamedTuple):
    """A model whose accuracy is not published, or not known here."""

    row: Row
    latency_ms: float

    def __str__(self) -> str:
        return f"{name_of(self.row)}, {size_of(self.row)}: {number(self.latency_ms, 4)} ms"


class Point(NamedTuple):
    """A model with its published accuracy in percent."""

    row: Row
    latency_ms: float
    top1: float

    @property
    def family(self) -> str | None:
        """Its family if it is one of ours."""
        return family_of(self.row.model) if is_ours(self.row) else None

    def __str__(self) -> str:
        return f"{Timed(self.row, self.latency_ms)}, {plain(self.top1)} % published"


def points_of(rows: Iterable[Row]) -> tuple[list[Point], list[Timed]]:
    """Return the models with a published accuracy, and those without by rising latency.

    A model stands at the size that its accuracy belongs to: its only one, or the usual one of several.
    """
    points: list[Point] = []
    timed: list[Timed] = []
    for row, latency_ms in _one_size_each(rows):
        top1 = row.published.top1 if row.published else None
        if top1 is None:
            timed.append(Timed(row, latency_ms))
        else:
            points.append(Point(row, latency_ms, top1))
    return points, sorted(timed, key=lambda one: one.latency_ms)


def _one_size_each(rows: Iterable[Row]) -> Iterator[tuple[Row, float]]:
    for of_model in grouped(rows, lambda row: (row.source, row.model)).values():
        sizes = {pixels_of(row) for row in of_model}
        for row in of_model:
            usual = len(sizes) == 1 or pixels_of(row) == _USUAL_PIXELS
            if row.forward is not None and not row.variant and usual:
                yield row, row.forward.median_ms
