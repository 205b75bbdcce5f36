"""The chart of the modes: how much faster each model runs than in eager PyTorch."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightspine.benchmark.report.charts.chart import Chart, Drawing
from lightspine.benchmark.report.charts.style import INKS, Layout, new_figure
from lightspine.benchmark.report.conditions import (
    MODES,
    Conditions,
    conditions_of,
    grouped,
    mode_order,
    name_of,
    size_of,
    status_in_words,
)
from lightspine.benchmark.report.numbers import TIMES, number
from lightspine.benchmark.results import Row

_BAR_INCHES, _GAP_INCHES = 0.155, 0.13
_MOST_IN_ONE_COLUMN = 8
# Full, hatched and empty: they differ on grey paper too.
_HATCHES = {"compile": "////"}


class ModeBar(NamedTuple):
    """One bar: a model in a mode other than eager.

    Attributes:
        row: what was measured.
        ratio: time in eager mode by time in this one, over 1 where this one is faster; `None` if it failed.
    """

    row: Row
    ratio: float | None


class ModelBars(NamedTuple):
    """The bars of one model.

    Attributes:
        eager: what they are compared with.
        eager_ms: its time.
        bars: by mode.
    """

    eager: Row
    eager_ms: float
    bars: list[ModeBar]


def compare_modes(rows: Sequence[Row]) -> list[ModelBars]:
    """Return the models of one conditions that ran in eager mode and were tried in another."""
    found = []
    for of_model in grouped(rows, lambda row: (row.source, row.model, row.variant, size_of(row))).values():
        eager = next((row for row in of_model if row.mode == "eager" and row.forward), None)
        others = [row for row in of_model if row.mode != "eager" and row.status != "absent"]
        if eager is None or eager.forward is None or not others:
            continue
        eager_ms = eager.forward.median_ms
        bars = [
            ModeBar(row, eager_ms / row.forward.median_ms if row.forward else None)
            for row in sorted(others, key=lambda row: mode_order(row.mode))
        ]
        found.append(ModelBars(eager, eager_ms, bars))
    return found


def mode_charts(rows: Sequence[Row], name: str) -> list[list[Chart]]:
    """Return a chart for each conditions under which a model ran in eager and in another mode.

    Args:
        rows: of one result file.
        name: unique beginning of the charts' names.
    """
    charts = []
    for position, (conditions, alike) in enumerate(grouped(rows, conditions_of).items(), start=1):
        models = compare_modes(alike)
        if any(bar.ratio is not None for model in models for bar in model.bars):
            charts.append([_chart(models, conditions, f"{name}-modes-{position}")])
    return charts


def _chart(models: Sequence[ModelBars], conditions: Conditions, name: str) -> Chart:
    title = f"Speed by mode against eager, {conditions.headline}"
    told = "; ".join(
        f"{name_of(model.eager)} {', '.join(f'{bar.row.mode} {_in_words(bar)}' for bar in model.bars)}"
        for model in models
    )
    return Chart(
        name=name,
        title=title,
        description=f"Speed of each mode as a multiple of eager mode, {conditions}: {told}.",
        caption="A bar is the time in eager mode divided by the time in the mode: beyond the line at 1 the "
        "mode is faster than eager PyTorch. Behind each bar stand the ratio and the median time.",
        draw=partial(_draw, models=models, title=title, conditions=str(conditions)),
    )


def _in_words(bar: ModeBar) -> str:
    if bar.ratio is None or bar.row.forward is None:
        return status_in_words(bar.row)
    return f"{bar.ratio:.2f}{TIMES}  {number(bar.row.forward.median_ms)} ms"


def _draw(layout: Layout, models: Sequence[ModelBars], title: str, conditions: str) -> Drawing:
    columns = 1 if layout.narrow or len(models) <= _MOST_IN_ONE_COLUMN else 2
    per_column = -(-len(models) // columns)
    one_size = len({size_of(model.eager) for model in models}) == 1
    parts = [models[start : start + per_column] for start in range(0, len(models), per_column)]
    inches = max(sum(_BAR_INCHES * len(model.bars) + _GAP_INCHES for model in part) for part in parts)
    figure = new_figure(layout, inches + 0.9, title, conditions)
    ratios = [bar.ratio for model in models for bar in model.bars if bar.ratio is not None]
    tips: dict[str, str] = {}
    for axes, part in zip(figure.subplots(1, columns, squeeze=False).flat, parts, strict=True):
        _draw_models(axes, part, tips, sizes=not one_size)
        axes.set_ylim(inches, -_GAP_INCHES)
        # Room for the words behind the longest bar.
        axes.set_xlim(0, max(1.15, *ratios) * (1.3 if columns == 1 and not layout.narrow else 1.75))
    shown = {bar.row.mode for model in models for bar in model.bars}
    figure.legend(
        handles=[Patch(label=mode, **_look(mode)) for mode in MODES if mode in shown],
        loc="outside upper right",
        ncols=3,
    )
    return Drawing(figure=figure, tips=tips)


def _draw_models(axes: Axes, models: Sequence[ModelBars], tips: dict[str, str], *, sizes: bool) -> None:
    place, names = 0.0, {}
    for model in models:
        first = place
        for bar in model.bars:
            _draw_bar(axes, bar, place, gid=f"bar-{len(tips)}")
            tips[f"bar-{len(tips)}"] = (
                f"{name_of(bar.row)}, {bar.row.mode}, {size_of(bar.row)}: {_in_words(bar)}"
            )
            place += _BAR_INCHES
        of_size = f", {size_of(model.eager)}" if sizes else ""
        names[(first + place - _BAR_INCHES) / 2] = (
            f"{name_of(model.eager)}{of_size}\neager {number(model.eager_ms)} ms"
        )
        place += _GAP_INCHES
    axes.axvline(1, color=INKS["ink"].light, linewidth=0.9, zorder=3)
    axes.set_yticks(list(names), list(names.values()), fontsize=7.2)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.grid(axis="x")
    axes.set_xlabel("times as fast as eager")


def _draw_bar(axes: Axes, bar: ModeBar, place: float, *, gid: str) -> None:
    axes.barh([place], [bar.ratio or 0.0], height=0.86 * _BAR_INCHES, gid=gid, **_look(bar.row.mode))
    axes.annotate(
        _in_words(bar),
        (bar.ratio or 0.0, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.2,
        color=INKS["ink" if bar.ratio else "muted"].light,
        fontstyle="normal" if bar.ratio else "italic",
        # Behind a bar shorter than 1 the words stand on the line at 1.
        bbox={"facecolor": INKS["paper"].light, "edgecolor": "none", "alpha": 0.85, "pad": 0.4},
        zorder=4,
    )


def _look(mode: str) -> dict[str, Any]:
    ink = INKS["accent"].light
    face = ink if mode == "optimized" else INKS["paper"].light
    return {"facecolor": face, "edgecolor": ink, "hatch": _HATCHES.get(mode), "linewidth": 0.7}
