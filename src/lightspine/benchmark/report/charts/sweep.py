"""The charts of time and memory against the size of the image, with the fitted power laws."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lightspine.benchmark.report.charts.chart import Chart, Drawing
from lightspine.benchmark.report.charts.style import (
    DASHES,
    INKS,
    PEER_MARKERS,
    Layout,
    Mark,
    below_axis,
    family_mark,
    fixed_ticks,
    log_axis,
    new_figure,
)
from lightspine.benchmark.report.conditions import Conditions, family_of, grouped, is_ours, pixels_of, size_of
from lightspine.benchmark.report.numbers import number
from lightspine.benchmark.report.sweeps import INFERENCE, TRAINING, Curve, Quantity, Series
from lightspine.benchmark.results import Row

_LEGEND_LINE = 0.17
# In shares of the axes' height: marks of what found no memory stand above all that was measured.
_TOP, _BELOW_TOP = 0.965, 0.055


class _Look(NamedTuple):
    mark: Mark
    face: str
    dashes: object


def sweep_charts(series: Sequence[Series], name: str) -> list[Chart]:
    """Return a chart of inference and one of training for each conditions that have series.

    Args:
        series: of one result file.
        name: unique beginning of the charts' names.
    """
    charts = []
    for position, (conditions, alike) in enumerate(
        grouped(series, lambda one: one.conditions).items(), start=1
    ):
        for kind, quantities in (("inference", INFERENCE), ("training", TRAINING)):
            shown = [quantity for quantity in quantities if any(one.curve(quantity) for one in alike)]
            if shown:
                charts.append(_chart(alike, shown, conditions, kind, f"{name}-sizes-{position}-{kind}"))
    return charts


def _chart(
    series: Sequence[Series], quantities: Sequence[Quantity], conditions: Conditions, kind: str, name: str
) -> Chart:
    title = f"Cost against image size, {kind}, {conditions.headline}"
    fits = [
        f"{one.name}, {quantity.name}: {curve.fit}"
        for quantity in quantities
        for one in series
        if (curve := one.curve(quantity)) and curve.fit
    ]
    told = f" Exponents over the pixel count: {'; '.join(fits)}." if fits else ""
    return Chart(
        name=name,
        title=title,
        description=f"{' and '.join(quantity.name for quantity in quantities)} against image size, "
        f"{conditions}.{told}",
        caption="Marks are measurements; lines are power laws fitted to them (least squares between "
        "logarithms). The exponent ± its standard error is over the pixel count: with 1 the cost grows as "
        "the pixels do, with 2 as their square. Both axes are logarithmic. A cross at the top marks a size "
        "for which the memory did not suffice.",
        draw=partial(_draw, series=series, quantities=quantities, title=title, conditions=conditions),
    )


def _draw(
    layout: Layout,
    series: Sequence[Series],
    quantities: Sequence[Quantity],
    title: str,
    conditions: Conditions,
) -> Drawing:
    stacked = layout.narrow
    legend_height = _LEGEND_LINE * (len(series) + 1)
    panel = (2.5 if stacked else 3.2) + legend_height
    figure = new_figure(layout, panel * (len(quantities) if stacked else 1), title, str(conditions))
    shape = (len(quantities), 1) if stacked else (1, len(quantities))
    grid = figure.subplots(*shape, squeeze=False)
    tips: dict[str, str] = {}
    looks = _looks(series)
    for panel_number, (axes, quantity) in enumerate(zip(grid.flat, quantities, strict=True)):
        _draw_panel(axes, quantity, series, looks, tips, f"panel-{panel_number}")
    return Drawing(figure=figure, tips=tips)


def _looks(series: Sequence[Series]) -> list[_Look]:
    looks: list[_Look] = []
    peers = 0
    for index, one in enumerate(series):
        row = one.rows[0]
        if is_ours(row):
            mark = family_mark(family_of(row.model))
            # The next of a family, such as another mode, is hollow.
            face = INKS["paper"].light if any(look.mark == mark for look in looks) else mark.colour
        else:
            mark = Mark(INKS["peer"].light, PEER_MARKERS[peers % len(PEER_MARKERS)])
            face = INKS["paper"].light
            peers += 1
        looks.append(_Look(mark, face, DASHES[index % len(DASHES)]))
    return looks


def _draw_panel(
    axes: Axes,
    quantity: Quantity,
    series: Sequence[Series],
    looks: Sequence[_Look],
    tips: dict[str, str],
    name: str,
) -> None:
    handles = []
    for index, (one, look) in enumerate(zip(series, looks, strict=True)):
        curve = one.curve(quantity)
        if curve is not None:
            _draw_curve(axes, curve, look, tips, f"{name}-series-{index}", one.name)
        exponent = curve.fit if curve and curve.fit else "no exponent: too few sizes"
        handles.append(_handle(look, f"{one.name}: {exponent}"))
    log_axis(axes, "x")
    log_axis(axes, "y")
    everything = [row for one in series for row in one.rows]
    ticks = {pixels_of(row): _side(row) for row in everything}
    fixed_ticks(axes, "x", list(ticks), list(ticks.values()))
    if len(ticks) > 5:
        axes.tick_params(axis="x", rotation=45)
    low, high = axes.get_ylim()
    spare = sum(bool(one.out_of_memory) for one in series)
    if spare:
        axes.set_ylim(low, high * (high / low) ** (_BELOW_TOP * (spare + 1)))
        _draw_missing(axes, series, looks, tips, name)
    axes.set_ylabel(f"{quantity.name} in {quantity.unit}")
    axes.set_xlabel("image size in px")
    axes.grid()
    axes.legend(
        handles=handles,
        title=f"exponent of {quantity.name}",
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below_axis(axes),
        alignment="left",
        handlelength=3.2,
        labelspacing=0.35,
        title_fontproperties={"weight": "bold", "size": 8},
    )


def _draw_curve(axes: Axes, curve: Curve, look: _Look, tips: dict[str, str], name: str, of_whom: str) -> None:
    if curve.fit is not None:
        ends = (curve.pixels[0], curve.pixels[-1])
        axes.plot(
            ends,
            [curve.fit.at(pixels) for pixels in ends],
            color=look.mark.colour,
            linestyle=look.dashes,
            zorder=3,
        )
    for row, pixels, cost in zip(curve.rows, curve.pixels, curve.costs, strict=True):
        gid = f"{name}-{size_of(row)}"
        tips[gid] = f"{of_whom}, {size_of(row)}: {number(cost, 4)} {curve.quantity.unit}"
        axes.plot(
            [pixels],
            [cost],
            linestyle="none",
            marker=look.mark.marker,
            markersize=5.5,
            markerfacecolor=look.face,
            markeredgecolor=look.mark.colour,
            zorder=4,
            gid=gid,
        )


def _draw_missing(
    axes: Axes, series: Sequence[Series], looks: Sequence[_Look], tips: dict[str, str], name: str
) -> None:
    height = _TOP
    for index, (one, look) in enumerate(zip(series, looks, strict=True)):
        for row in one.out_of_memory:
            gid = f"{name}-missing-{index}-{size_of(row)}"
            tips[gid] = f"{one.name}, {size_of(row)}: out of memory"
            axes.plot(
                [pixels_of(row)],
                [height],
                transform=axes.get_xaxis_transform(),
                linestyle="none",
                marker="x",
                markersize=6,
                markeredgewidth=1.6,
                color=look.mark.colour,
                gid=gid,
            )
        height -= _BELOW_TOP * bool(one.out_of_memory)


def _handle(look: _Look, name: str) -> Line2D:
    return Line2D(
        [],
        [],
        color=look.mark.colour,
        linestyle=look.dashes,  # type: ignore[arg-type]
        marker=look.mark.marker,
        markersize=5.5,
        markerfacecolor=look.face,
        markeredgecolor=look.mark.colour,
        label=name,
    )


def _side(row: Row) -> str:
    return str(row.height) if row.height == row.width else size_of(row)
