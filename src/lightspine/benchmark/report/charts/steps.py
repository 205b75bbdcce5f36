"""The chart of the steps of one model, such as (a) to (g) of VMamba: measured beside published throughput."""

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes

from lightspine.benchmark.report.charts.chart import Chart, Drawing
from lightspine.benchmark.report.charts.style import INKS, Layout, new_figure
from lightspine.benchmark.report.conditions import (
    Conditions,
    conditions_of,
    grouped,
    mode_order,
    name_of,
    status_in_words,
)
from lightspine.benchmark.report.numbers import TIMES, cut, number, plain
from lightspine.benchmark.results import Row

_FEWEST_STEPS = 2
_ROW_INCHES = 0.27
_MOST_LETTERS = 30
_CAPTION = "Longer is better; in brackets the ratio to the first bar."
_PUBLISHED_TOO = (
    "The hatched bars are published and come from another device: their ratios compare with the measured "
    "ones, their lengths do not."
)


def step_charts(rows: Sequence[Row], name: str, order: Sequence[str] = ()) -> list[list[Chart]]:
    """Return the charts of each conditions under which two or more steps were measured, one for each mode.

    Args:
        rows: of one result file; those of a step have a variant.
        name: unique beginning of the charts' names.
        order: of the steps, as far as it is known; a file has them as they were run.
    """
    places = {variant: place for place, variant in enumerate(order)}
    steps = sorted(
        (row for row in rows if row.variant), key=lambda row: places.get(row.variant or "", len(places))
    )
    present = [row for row in steps if row.status != "absent"]
    charts = []
    for position, (conditions, alike) in enumerate(grouped(present, conditions_of).items(), start=1):
        modes = grouped(alike, lambda row: row.mode)
        charts.append(
            [
                _chart(
                    # A step that is absent was run under no conditions and has its place under all.
                    [row for row in steps if row in modes[mode] or row.status == "absent"],
                    conditions,
                    mode,
                    f"{name}-steps-{position}-{mode}",
                )
                for mode in sorted(modes, key=mode_order)
                if sum(row.forward is not None for row in modes[mode]) >= _FEWEST_STEPS
            ]
        )
    return [of_conditions for of_conditions in charts if of_conditions]


def _measured(row: Row) -> float | None:
    return row.forward.images_per_s if row.forward else None


def _published(row: Row) -> float | None:
    return row.published.throughput if row.published else None


def _has_published(rows: Sequence[Row]) -> bool:
    # A published rate alone, of a step that was not measured, compares with nothing.
    return any(_published(row) for row in rows if row.forward)


def _chart(rows: Sequence[Row], conditions: Conditions, mode: str, name: str) -> Chart:
    title = f"Throughput step by step, {mode}, {conditions.headline}"
    told = "; ".join(
        f"{name_of(row)} {status_in_words(row) if (rate := _measured(row)) is None else number(rate, 4)}"
        for row in rows
    )
    return Chart(
        name=name,
        title=title,
        description=f"Measured images per second, mode {mode}, {conditions}: {told}.",
        caption=f"{_CAPTION} {_PUBLISHED_TOO}" if _has_published(rows) else _CAPTION,
        draw=partial(_draw, rows=rows, title=title, conditions=str(conditions)),
    )


def _draw(layout: Layout, rows: Sequence[Row], title: str, conditions: str) -> Drawing:
    published = _has_published(rows)
    panels = 1 + published
    stacked = layout.narrow
    height = (0.7 + _ROW_INCHES * len(rows)) * (panels if stacked else 1)
    figure = new_figure(layout, height, title, conditions)
    grid = figure.subplots(*((panels, 1) if stacked else (1, panels)), squeeze=False)
    tips: dict[str, str] = {}
    for row_number, row in enumerate(rows):
        top1 = row.published.top1 if row.published else None
        accuracy = f", {top1:g} % published" if top1 else ""
        note = f": {row.note}" if row.note else ""
        for of_published in (False, True):
            tips[_gid(row_number, published=of_published)] = f"{name_of(row)}{accuracy}{note}"
    names = _names(rows)
    _draw_bars(grid.flat[0], rows, names, _measured, published=False)
    grid.flat[0].set_xlabel("measured here: images per second")
    if published:
        axes = grid.flat[1]
        _draw_bars(axes, rows, names if stacked else [""] * len(rows), _published, published=True)
        axes.set_xlabel(f"published: images per second{_devices(rows)}")
    return Drawing(figure=figure, tips=tips)


def _gid(place: int, *, published: bool) -> str:
    return f"{'published' if published else 'measured'}-{place}"


def _names(rows: Sequence[Row]) -> list[str]:
    variants = [row.variant or "" for row in rows]
    if len(set(variants)) < len(variants):
        return [name_of(row) for row in rows]
    return [cut(variant, _MOST_LETTERS) for variant in variants]


def _devices(rows: Sequence[Row]) -> str:
    devices = {row.published.throughput_device for row in rows if row.published and _published(row)} - {None}
    return cut(f", {', '.join(sorted(map(str, devices)))}", _MOST_LETTERS) if devices else ""


def _draw_bars(
    axes: Axes,
    rows: Sequence[Row],
    names: Sequence[str],
    value_of: Callable[[Row], float | None],
    *,
    published: bool,
) -> None:
    ink = INKS["published" if published else "accent"].light
    places = range(len(rows))
    values = [value_of(row) or 0.0 for row in rows]
    first = next(filter(None, values), None)
    bars = axes.barh(
        places,
        values,
        height=0.68,
        facecolor=INKS["paper"].light if published else ink,
        edgecolor=ink,
        hatch="////" if published else None,
        linewidth=0.8,
    )
    for place, (row, bar) in enumerate(zip(rows, bars, strict=True)):
        bar.set_gid(_gid(place, published=published))
        value = value_of(row)
        missing = "not published" if published else status_in_words(row)
        written = plain(value or 0) if published else number(value or 0)
        axes.annotate(
            missing if value is None or first is None else f"{written}  ({value / first:.2f}{TIMES})",
            (value or 0.0, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INKS["muted" if value is None else "ink"].light,
            fontstyle="italic" if value is None else "normal",
        )
    axes.set_yticks(list(places), list(names))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.42 * max(values))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
