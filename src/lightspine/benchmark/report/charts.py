"""Charts of a benchmark report: accuracy over latency, latency, training steps, resolution sweeps, modes."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.benchmark.plot_style import (
    COLORS,
    PEER_MARKER,
    family_marker,
    new_figure,
    plot_style,
    set_log_scale,
)
from lightspine.benchmark.report.conditions import (
    MODES,
    TIMES,
    Conditions,
    conditions_of,
    count_pixels,
    family_of,
    format_number,
    format_published,
    format_size,
    format_status,
    group_by,
    short_name,
)
from lightspine.benchmark.report.sweeps import INFERENCE, TRAINING, Quantity, Sweep
from lightspine.benchmark.results import Row
from lightspine.benchmark.scatter import ScatterPoint, plot_accuracy_over_latency

_BAR_INCHES = 0.27
_PNG_DPI = 160
_USUAL_PIXELS = 224 * 224
_PEER_SYMBOLS = "XPd*<>8H"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))
# Bars are filled, hatched or hollow, so that they differ in black and white.
_MODE_HATCHES = {"compile": "////"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart.

    Attributes:
        name: stem of its files, unique in a report, of letters, digits and hyphens.
        title: heading.
        alt: text alternative with the main numbers, for screen readers.
        caption: how to read it.
        figure: the drawing.
    """

    name: str
    title: str
    alt: str
    caption: str
    figure: Figure

    def save(self, file_format: str) -> bytes:
        """Return the chart as "png" or "svg"."""
        buffer = io.BytesIO()
        metadata = {"Date": None, "Title": self.title} if file_format == "svg" else None
        with plot_style():
            self.figure.savefig(buffer, format=file_format, dpi=_PNG_DPI, metadata=metadata)
        return buffer.getvalue()


def accuracy_charts(rows: Sequence[Row], prefix: str) -> list[Chart]:
    """Plot published accuracy over measured latency, once per conditions and mode with two or more models.

    Args:
        rows: rows of one result file.
        prefix: start of the charts' names.
    """
    charts = []
    for position, (conditions, group) in enumerate(group_by(rows, conditions_of).items(), start=1):
        for mode, of_mode in _by_mode(group):
            points = [
                (row, row.forward.median_ms, row.published.top1)
                for row in _at_one_size(of_mode)
                if row.forward and row.published and row.published.top1 is not None
            ]
            if len(points) > 1:
                name = f"{prefix}-accuracy-{position}-{mode}"
                charts.append(_accuracy_chart(points, conditions, mode, name))
    return charts


def latency_charts(rows: Sequence[Row], prefix: str) -> list[Chart]:
    """Plot the latency of all models as bars, once per conditions and mode."""
    return _bar_charts(rows, prefix, "latency", "Latency", "latency", lambda row: row.forward)


def training_charts(rows: Sequence[Row], prefix: str) -> list[Chart]:
    """Plot the time of a training step as bars, once per conditions and mode."""
    return _bar_charts(rows, prefix, "training", "Training step", "training step", lambda row: row.train_step)


def sweep_charts(sweeps: Sequence[Sweep], prefix: str) -> list[Chart]:
    """Plot time and memory over the image size, once per conditions for inference and for training."""
    charts = []
    groups = group_by(sweeps, lambda sweep: sweep.conditions)
    for position, (conditions, group) in enumerate(groups.items(), start=1):
        for kind, quantities in (("inference", INFERENCE), ("training", TRAINING)):
            shown = [quantity for quantity in quantities if any(sweep.curve(quantity) for sweep in group)]
            if shown:
                name = f"{prefix}-sizes-{position}-{kind}"
                charts.append(_sweep_chart(group, shown, conditions, kind, name))
    return charts


def mode_charts(rows: Sequence[Row], prefix: str) -> list[Chart]:
    """Plot the speed of each mode relative to eager mode, once per conditions."""
    charts = []
    for position, (conditions, group) in enumerate(group_by(rows, conditions_of).items(), start=1):
        models = compare_with_eager(group)
        if any(speedup is not None for _, others in models for _, speedup in others):
            charts.append(_mode_chart(models, conditions, f"{prefix}-modes-{position}"))
    return charts


def compare_with_eager(rows: Sequence[Row]) -> list[tuple[Row, list[tuple[Row, float | None]]]]:
    """Return each model's eager row with its rows in other modes and their speed-ups.

    A speed-up is the eager time divided by the time of the mode; `None` if the mode failed.
    """
    models = []
    groups = group_by(rows, lambda row: (row.source, row.model, row.variant, row.height, row.width))
    for group in groups.values():
        eager = next((row for row in group if row.mode == "eager" and row.forward), None)
        others = [row for row in group if row.mode != "eager" and row.status != "absent"]
        if eager is not None and eager.forward is not None and others:
            eager_ms = eager.forward.median_ms
            others.sort(key=lambda row: MODES.index(row.mode))
            speedups = [(row, eager_ms / row.forward.median_ms if row.forward else None) for row in others]
            models.append((eager, speedups))
    return models


def _by_mode(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return sorted(group_by(rows, lambda row: row.mode).items(), key=lambda item: MODES.index(item[0]))


def _at_one_size(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of registered models at one size: at their only one, or else at 224 x 224."""
    found = []
    for group in group_by(rows, lambda row: (row.source, row.model)).values():
        one_size = len({count_pixels(row) for row in group}) == 1
        found += [
            row for row in group if not row.variant and (one_size or count_pixels(row) == _USUAL_PIXELS)
        ]
    return found


def _describe_time(row: Row, timing: Timing) -> str:
    return f"{short_name(row)}, {format_size(row)}: {format_number(timing.median_ms, 4)} ms"


def _accuracy_chart(
    points: Sequence[tuple[Row, float, float]], conditions: Conditions, mode: str, name: str
) -> Chart:
    title = f"Accuracy over latency, {mode}, {conditions.short}"
    figure, unplaced = plot_accuracy_over_latency(
        [
            ScatterPoint(
                label=short_name(row),
                latency_ms=latency_ms,
                accuracy=top1,
                family=family_of(row),
                keep_label=family_of(row) is not None,
            )
            for row, latency_ms, top1 in points
        ],
        title=title,
        note=f"lightspine bench: {conditions}",
        x_label="measured latency in ms (median)",
        y_label="published ImageNet-1k top-1 accuracy in %",
    )
    missing = f" {len(unplaced)} labels did not fit; the table lists all models." if unplaced else ""
    told = "; ".join(
        f"{_describe_time(row, row.forward)}, {format_published(top1)} %"
        for row, _, top1 in points
        if row.forward
    )
    return Chart(
        name=name,
        title=title,
        alt=f"Published top-1 accuracy over measured latency of {len(points)} models, mode {mode}, "
        f"{conditions}: {told}.",
        caption="Up and left is better. Filled markers are models of lightspine, hollow ones models of timm. "
        "The dashed line is the Pareto front. Models without a published accuracy are in the table only."
        + missing,
        figure=figure,
    )


def _bar_charts(
    rows: Sequence[Row],
    prefix: str,
    kind: str,
    heading: str,
    quantity: str,
    timing_of: Callable[[Row], Timing | None],
) -> list[Chart]:
    charts = []
    for position, (conditions, group) in enumerate(group_by(rows, conditions_of).items(), start=1):
        for mode, of_mode in _by_mode(group):
            timed = [(row, timing) for row in of_mode if (timing := timing_of(row))]
            if timed:
                title = f"{heading}, {mode}, {conditions.short}"
                told = "; ".join(_describe_time(row, timing) for row, timing in timed)
                charts.append(
                    Chart(
                        name=f"{prefix}-{kind}-{position}-{mode}",
                        title=title,
                        alt=f"Measured {quantity}, mode {mode}, {conditions}: {told}.",
                        caption="Shorter is better. A bar is the median, the thin line ends at the 90th "
                        "percentile. Filled bars are models of lightspine, hollow ones models of timm.",
                        figure=_draw_bars(
                            timed, title, f"lightspine bench: {conditions}", f"{quantity} in ms"
                        ),
                    )
                )
    return charts


def _draw_bars(timed: Sequence[tuple[Row, Timing]], title: str, note: str, x_label: str) -> Figure:
    with plot_style():
        figure = new_figure(1.3 + _BAR_INCHES * len(timed), title=title, note=note)
        axes = figure.add_subplot()
        one_size = len({format_size(row) for row, _ in timed}) == 1
        ours = [row.source == "lightspine" for row, _ in timed]
        edges = [COLORS["accent" if own else "peer"].light for own in ours]
        bars = axes.barh(
            range(len(timed)),
            [timing.median_ms for _, timing in timed],
            xerr=[[0.0] * len(timed), [timing.p90_ms - timing.median_ms for _, timing in timed]],
            height=0.6,
            color=[
                edge if own else COLORS["background"].light for own, edge in zip(ours, edges, strict=True)
            ],
            edgecolor=edges,
            linewidth=0.9,
            error_kw={"ecolor": COLORS["muted"].light, "elinewidth": 0.9},
        )
        axes.bar_label(bars, [format_number(timing.median_ms) for _, timing in timed], padding=4, fontsize=8)
        axes.set_yticks(
            range(len(timed)),
            [short_name(row) if one_size else f"{short_name(row)}, {format_size(row)}" for row, _ in timed],
        )
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x_label)
        axes.grid(axis="x")
        return figure


def _mode_chart(
    models: Sequence[tuple[Row, list[tuple[Row, float | None]]]], conditions: Conditions, name: str
) -> Chart:
    title = f"Speed relative to eager mode, {conditions.short}"
    told = "; ".join(
        f"{short_name(row)} {row.mode} {_describe_speedup(row, speedup)}"
        for _, others in models
        for row, speedup in others
    )
    return Chart(
        name=name,
        title=title,
        alt=f"Speed of each mode relative to eager mode, {conditions}: {told}.",
        caption="A bar is the eager time divided by the time of the mode: beyond 1 the mode is faster. "
        "Beside each bar are the ratio and the median time.",
        figure=_draw_mode_bars(models, title, f"lightspine bench: {conditions}"),
    )


def _describe_speedup(row: Row, speedup: float | None) -> str:
    if speedup is None or row.forward is None:
        return format_status(row)
    return f"{speedup:.2f}{TIMES}  {format_number(row.forward.median_ms)} ms"


def _draw_mode_bars(
    models: Sequence[tuple[Row, list[tuple[Row, float | None]]]], title: str, note: str
) -> Figure:
    modes = [mode for mode in MODES if any(row.mode == mode for _, others in models for row, _ in others)]
    height = 0.8 / len(modes)
    inches = len(models) * max(0.3, 0.17 * len(modes) + 0.1)
    with plot_style():
        figure = new_figure(1.3 + inches, title=title, note=note)
        axes = figure.add_subplot()
        for index, mode in enumerate(modes):
            shown = [
                (place + (index - (len(modes) - 1) / 2) * height, row, speedup)
                for place, (_, others) in enumerate(models)
                for row, speedup in others
                if row.mode == mode
            ]
            bars = axes.barh(
                [y for y, _, _ in shown],
                [speedup or 0.0 for _, _, speedup in shown],
                height=0.9 * height,
                label=mode,
                facecolor=COLORS["accent" if mode == "optimized" else "background"].light,
                edgecolor=COLORS["accent"].light,
                hatch=_MODE_HATCHES.get(mode),
                linewidth=0.7,
            )
            labels = [_describe_speedup(row, speedup) for _, row, speedup in shown]
            background = {
                "facecolor": COLORS["background"].light,
                "edgecolor": "none",
                "alpha": 0.85,
                "pad": 0.4,
            }
            axes.bar_label(bars, labels, padding=4, fontsize=7.2, bbox=background, zorder=4)
        sizes_differ = len({format_size(eager) for eager, _ in models}) > 1
        axes.set_yticks(
            range(len(models)),
            [
                f"{short_name(eager)}{f', {format_size(eager)}' if sizes_differ else ''}\n"
                f"eager {format_number(eager.forward.median_ms if eager.forward else 0)} ms"
                for eager, _ in models
            ],
            fontsize=7.2,
        )
        axes.invert_yaxis()
        axes.set_ylim(len(models) - 0.4, -0.6)
        axes.margins(x=0.25)
        axes.axvline(1, color=COLORS["text"].light, linewidth=0.9, zorder=3)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
        axes.set_xlabel("speed relative to eager mode")
        axes.grid(axis="x")
        figure.legend(loc="outside upper right", ncols=len(modes))
        return figure


def _sweep_chart(
    sweeps: Sequence[Sweep], quantities: Sequence[Quantity], conditions: Conditions, kind: str, name: str
) -> Chart:
    title = f"Cost over image size, {kind}, {conditions.short}"
    fits = [
        f"{sweep.name}, {quantity.name}: {curve.fit}"
        for quantity in quantities
        for sweep in sweeps
        if (curve := sweep.curve(quantity)) and curve.fit
    ]
    exponents = f" Exponents over the pixel count: {'; '.join(fits)}." if fits else ""
    return Chart(
        name=name,
        title=title,
        alt=f"{' and '.join(quantity.name for quantity in quantities)} over image size, {conditions}."
        + exponents,
        caption="Markers are measurements, lines are fitted power laws. The legend has the exponent over "
        "the pixel count with its standard error: 1 is linear in the pixels, 2 quadratic. A cross at the top "
        "is a size that ran out of memory.",
        figure=_draw_sweeps(sweeps, quantities, title, f"lightspine bench: {conditions}"),
    )


def _draw_sweeps(sweeps: Sequence[Sweep], quantities: Sequence[Quantity], title: str, note: str) -> Figure:
    with plot_style():
        figure = new_figure(4.2 + 0.17 * len(sweeps), title=title, note=note)
        looks = _sweep_styles(sweeps)
        for axes, quantity in zip(
            figure.subplots(1, len(quantities), squeeze=False).flat, quantities, strict=True
        ):
            for place, (sweep, look) in enumerate(zip(sweeps, looks, strict=True)):
                _draw_sweep(axes, sweep, quantity, look, top=0.97 - 0.05 * place)
            set_log_scale(axes, "x")
            set_log_scale(axes, "y")
            # The crosses of sizes that ran out of memory need room at the top.
            axes.margins(y=0.2 if any(sweep.out_of_memory for sweep in sweeps) else 0.05)
            ticks = {count_pixels(row): _format_side(row) for sweep in sweeps for row in sweep.rows}
            axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_ticklabels(list(ticks.values()), rotation=90 if len(ticks) > 5 else 0)
            axes.set_xlabel("image size in pixels")
            axes.set_ylabel(f"{quantity.name} in {quantity.unit}")
            axes.grid()
            axes.legend(
                title=f"exponent of {quantity.name}",
                loc="upper left",
                bbox_to_anchor=(0, -0.22),
                alignment="left",
                handlelength=3.2,
            )
        return figure


def _sweep_styles(sweeps: Sequence[Sweep]) -> list[dict[str, Any]]:
    """Return line and marker style of each sweep; a second sweep of a family has hollow markers."""
    looks: list[dict[str, Any]] = []
    families: list[str | None] = []
    for index, sweep in enumerate(sweeps):
        family = family_of(sweep.rows[0])
        if family is None:
            color, symbol = PEER_MARKER.color, _PEER_SYMBOLS[families.count(None) % len(_PEER_SYMBOLS)]
        else:
            color, symbol = family_marker(family)
        hollow = family is None or family in families
        families.append(family)
        looks.append(
            {
                "color": color,
                "linestyle": _DASHES[index % len(_DASHES)],
                "marker": symbol,
                "markersize": 5.5,
                "markerfacecolor": COLORS["background"].light if hollow else color,
            }
        )
    return looks


def _draw_sweep(axes: Axes, sweep: Sweep, quantity: Quantity, look: dict[str, Any], *, top: float) -> None:
    curve = sweep.curve(quantity)
    fit = curve.fit if curve else None
    axes.add_line(Line2D([], [], label=f"{sweep.name}: {fit or 'fewer than three sizes'}", **look))
    if curve is not None:
        axes.plot(curve.pixels, curve.costs, **(look | {"linestyle": "none"}))
    if curve is not None and fit is not None:
        ends = [curve.pixels[0], curve.pixels[-1]]
        axes.plot(ends, [fit.at(pixels) for pixels in ends], **(look | {"marker": None}))
    missing = [count_pixels(row) for row in sweep.out_of_memory]
    axes.plot(
        missing,
        [top] * len(missing),
        transform=axes.get_xaxis_transform(),
        linestyle="none",
        marker="x",
        markersize=6,
        markeredgewidth=1.6,
        color=look["color"],
    )


def _format_side(row: Row) -> str:
    return str(row.height) if row.height == row.width else format_size(row)
