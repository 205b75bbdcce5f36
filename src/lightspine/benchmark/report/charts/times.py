"""The chart of plain latencies, for models of which no accuracy is published."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.benchmark.report.charts.chart import Chart, Drawing
from lightspine.benchmark.report.charts.style import INKS, Layout, new_figure
from lightspine.benchmark.report.conditions import (
    Conditions,
    conditions_of,
    grouped,
    is_ours,
    mode_order,
    name_of,
    size_of,
)
from lightspine.benchmark.report.numbers import number
from lightspine.benchmark.results import Row

_ROW_INCHES = 0.27


class _Bar(NamedTuple):
    row: Row
    time: Timing

    def __str__(self) -> str:
        return f"{name_of(self.row)}, {size_of(self.row)}: {number(self.time.median_ms, 4)} ms"


def time_charts(rows: Sequence[Row], name: str) -> list[list[Chart]]:
    """Return the charts of each conditions, one for each mode.

    Args:
        rows: of one result file.
        name: unique beginning of the charts' names.
    """
    bars = [_Bar(row, row.forward) for row in rows if row.forward]
    charts = []
    for position, (conditions, alike) in enumerate(
        grouped(bars, lambda bar: conditions_of(bar.row)).items(), start=1
    ):
        modes = grouped(alike, lambda bar: bar.row.mode)
        charts.append(
            [
                _chart(modes[mode], conditions, mode, f"{name}-latency-{position}-{mode}")
                for mode in sorted(modes, key=mode_order)
            ]
        )
    return charts


def _chart(bars: Sequence[_Bar], conditions: Conditions, mode: str, name: str) -> Chart:
    title = f"Latency, {mode}, {conditions.headline}"
    return Chart(
        name=name,
        title=title,
        description=f"Measured latency, mode {mode}, {conditions}: {'; '.join(map(str, bars))}.",
        caption="Shorter is better. The thin line ends where nine of ten calls were done. Filled bars are "
        "models of lightspine, hollow ones from timm.",
        draw=partial(_draw, bars=bars, title=title, conditions=str(conditions)),
    )


def _draw(layout: Layout, bars: Sequence[_Bar], title: str, conditions: str) -> Drawing:
    figure = new_figure(layout, 0.7 + _ROW_INCHES * len(bars), title, conditions)
    axes = figure.add_subplot()
    one_size = len({size_of(bar.row) for bar in bars}) == 1
    names = [name_of(bar.row) if one_size else f"{name_of(bar.row)}, {size_of(bar.row)}" for bar in bars]
    for place, bar in enumerate(bars):
        ink = INKS["accent" if is_ours(bar.row) else "peer"].light
        axes.barh(
            [place],
            [bar.time.median_ms],
            height=0.6,
            facecolor=ink if is_ours(bar.row) else INKS["paper"].light,
            edgecolor=ink,
            linewidth=0.9,
            gid=f"time-{place}",
        )
        ends = (bar.time.median_ms, bar.time.p90_ms)
        axes.plot(ends, (place, place), color=INKS["muted"].light, linewidth=0.9)
        axes.annotate(
            number(bar.time.median_ms),
            (max(ends), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(max(bar.time.median_ms, bar.time.p90_ms) for bar in bars))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("measured: latency in ms, median")
    axes.grid(axis="x")
    return Drawing(figure=figure, tips={f"time-{place}": str(bar) for place, bar in enumerate(bars)})
