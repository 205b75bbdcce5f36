"""Draws accuracy against latency, and below it the models of which only the time is known."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightspine.benchmark.report.charts.chart import Drawing
from lightspine.benchmark.report.charts.labelling import Label, write_labels
from lightspine.benchmark.report.charts.scatter_points import Point, Timed
from lightspine.benchmark.report.charts.style import (
    INKS,
    Layout,
    Mark,
    below_axis,
    family_mark,
    log_axis,
    new_figure,
)
from lightspine.benchmark.report.conditions import Conditions, family_of, is_ours, name_of

_STRIP_ROW = 0.155
_PEER = Mark(INKS["peer"].light, "o")
_MARKER_PT = 6.5
_DASHES = (0, (4, 2))


def draw_scatter(
    layout: Layout,
    points: Sequence[Point],
    timed: Sequence[Timed],
    best: Sequence[Point],
    conditions: Conditions,
    title: str,
) -> Drawing:
    """Draw the chart.

    Args:
        layout: the paper.
        points: models with a published accuracy.
        timed: models without, fastest first.
        best: the points that no other beats, fastest first.
        conditions: that all of them were measured under.
        title: of the chart.
    """
    height = min(5.1, 3.4 + 0.1 * len(points)) + 0.7 * layout.narrow
    strip = _STRIP_ROW * (len(timed) + 1) * bool(timed)
    figure = new_figure(layout, height + strip, title, str(conditions))
    if timed:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[height - 0.8, strip])
    else:
        axes = below = figure.add_subplot()
    tips: dict[str, str] = {}
    for index, point in enumerate(points):
        mark = family_mark(point.family) if point.family else _PEER
        gid = f"point-{index}"
        tips[gid] = str(point)
        _draw_mark(axes, point.latency_ms, point.top1, mark, filled=point.family is not None, gid=gid)
    times = [point.latency_ms for point in points] + [one.latency_ms for one in timed]
    _set_axes(axes, times, [point.top1 for point in points])
    if timed:
        _draw_strip(below, timed, tips)
        axes.tick_params(axis="x", labelbottom=False)
    below.set_xlabel(f"measured: latency of {conditions.images} in ms, median")
    corners = _draw_front(axes, best)
    below.legend(
        handles=_legend(points, timed),
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below_axis(below),
        ncols=3 if layout.narrow else 7,
        handletextpad=0.4,
        columnspacing=1.2,
    )
    # Ours and the best find room first; a peer's name may have to give way.
    by_weight = sorted(points, key=lambda point: (point.family is None, point not in best))
    labels = [
        Label(
            name_of(point.row),
            point.latency_ms,
            point.top1,
            INKS["ink" if point.family else "muted"].light,
            bold=point.family is not None,
        )
        for point in by_weight
    ]
    missing = write_labels(
        figure, axes, labels, marker_pt=_MARKER_PT, size=6.8 if layout.narrow else 7.2, line=corners
    )
    note = (
        "" if not missing else f"{missing} name{'s' * (missing > 1)} found no room; the table has them all."
    )
    return Drawing(figure=figure, tips=tips, note=note)


def _draw_strip(axes: Axes, timed: Sequence[Timed], tips: dict[str, str]) -> None:
    """Draw one line for each model that has a time and no accuracy, its name beside its mark."""
    middle = math.sqrt(math.prod(axes.get_xlim()))
    for place, one in enumerate(timed):
        gid = f"timed-{place}"
        tips[gid] = f"{one}, accuracy not published"
        mark = family_mark(family_of(one.row.model)) if is_ours(one.row) else _PEER
        _draw_mark(axes, one.latency_ms, place, mark, filled=is_ours(one.row), gid=gid)
        on_left = one.latency_ms > middle
        axes.annotate(
            name_of(one.row),
            (one.latency_ms, place),
            xytext=(-6 if on_left else 6, 0),
            textcoords="offset points",
            ha="right" if on_left else "left",
            va="center",
            fontsize=7.0,
            color=INKS["muted"].light,
        )
    axes.set_ylim(len(timed) - 0.4, -0.8)
    axes.set_yticks([])
    axes.set_ylabel("time only", fontsize=7.5)
    axes.grid(axis="x")


def _draw_mark(axes: Axes, x: float, y: float, mark: Mark, *, filled: bool, gid: str) -> None:
    axes.plot(
        [x],
        [y],
        linestyle="none",
        marker=mark.marker,
        markersize=_MARKER_PT,
        markerfacecolor=mark.colour if filled else INKS["paper"].light,
        markeredgecolor=mark.colour,
        markeredgewidth=1.1,
        zorder=5 if filled else 4,
        gid=gid,
    )


def _set_axes(axes: Axes, times: Sequence[float], scores: Sequence[float]) -> None:
    log_axis(axes, "x")
    # Room at the right for names; at least a factor of four in all, so that near models look near.
    spread = max(4.0, max(times) / min(times)) / (max(times) / min(times))
    axes.set_xlim(min(times) / (1.25 * spread**0.5), max(times) * 1.5 * spread**0.5)
    margin = max(0.12 * (max(scores) - min(scores)), 0.5)
    axes.set_ylim(min(scores) - margin, max(scores) + margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.set_ylabel("published: ImageNet-1k top-1 in %")
    axes.grid()


def _draw_front(axes: Axes, best: Sequence[Point]) -> list[tuple[float, float]]:
    """Draw the line of the models that no other beats, and return its corners."""
    # What can be had at a time is had at any longer one: each step runs on to the next, the last to the edge.
    ends = [*(point.latency_ms for point in best[1:]), axes.get_xlim()[1]]
    corners = [
        (x, point.top1) for point, end in zip(best, ends, strict=True) for x in (point.latency_ms, end)
    ]
    axes.plot(
        *zip(*corners, strict=True), color=INKS["muted"].light, linewidth=0.9, linestyle=_DASHES, zorder=1
    )
    return corners


def _legend(points: Sequence[Point], timed: Sequence[Timed]) -> list[Line2D]:
    def entry(name: str, mark: Mark, face: str) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="none",
            marker=mark.marker,
            markersize=_MARKER_PT,
            markerfacecolor=face,
            markeredgecolor=mark.colour,
            label=name,
        )

    ours = sorted({point.family for point in points if point.family})
    entries = [entry(family, family_mark(family), family_mark(family).colour) for family in ours]
    if timed or any(point.family is None for point in points):
        entries.append(entry("peer (timm)", _PEER, INKS["paper"].light))
    front = Line2D([], [], color=INKS["muted"].light, linewidth=0.9, linestyle=_DASHES, label="not beaten")
    return [*entries, front]
