"""Scatter plot of accuracy over latency, with labels that do not overlap."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from lightspine.benchmark.plot_style import COLORS, family_marker, new_figure, plot_style, set_log_scale
from lightspine.errors import UsageError

_MARKER_AREA = 42.0
# Label positions around a marker in degrees, best first, and distances from its edge in points.
_ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 67, 113, 293, 247)
_DISTANCES = (2.5, 8.0, 15.0, 24.0, 34.0, 46.0)
_LEADER_FROM = 8.0
_MARGIN = 0.5


@dataclass(frozen=True, kw_only=True)
class ScatterPoint:
    """One model of the plot.

    Attributes:
        label: text beside the marker.
        latency_ms: position on the logarithmic x axis.
        accuracy: position on the y axis, in percent.
        family: family of a model of lightspine; `None` for other models, which have a hollow marker.
        params: number of parameters, which sets the marker area; `None` for the default area.
        keep_label: draw the label even if it overlaps something.
    """

    label: str
    latency_ms: float
    accuracy: float
    family: str | None = None
    params: int | None = None
    keep_label: bool = True

    @property
    def area(self) -> float:
        """Marker area in square points."""
        return _MARKER_AREA if self.params is None else _MARKER_AREA + 6.0 * self.params / 1e6


def plot_accuracy_over_latency(
    points: Sequence[ScatterPoint], *, title: str, note: str, x_label: str, y_label: str
) -> tuple[Figure, list[str]]:
    """Plot accuracy over latency, with a line through the Pareto front.

    Args:
        points: the models.
        title: above the plot.
        note: in small print below the plot.
        x_label: label of the latency axis.
        y_label: label of the accuracy axis.

    Returns:
        The figure, and the labels that did not fit.

    Raises:
        UsageError: there is no point.
    """
    if not points:
        raise UsageError("expected at least one model to plot, got none")
    with plot_style():
        figure = new_figure(min(5.6, 3.9 + 0.1 * len(points)), title=title, note=note)
        axes = figure.add_subplot()
        for point in points:
            marker = family_marker(point.family)
            axes.scatter(
                [point.latency_ms],
                [point.accuracy],
                s=point.area,
                marker=marker.symbol,
                facecolors=COLORS["background"].light if point.family is None else marker.color,
                edgecolors=marker.color,
                linewidths=1.1,
                alpha=0.9,
                # Small markers stay visible on top of large ones.
                zorder=3 + 1 / point.area,
            )
        _set_axes(axes, points)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        front = [points[index] for index in pareto_front(points)]
        axes.step(
            [point.latency_ms for point in front] + [axes.get_xlim()[1]],
            [point.accuracy for point in front] + [front[-1].accuracy],
            where="post",
            color=COLORS["muted"].light,
            linewidth=0.8,
            linestyle=(0, (4, 2)),
            zorder=1,
        )
        axes.legend(handles=_legend_handles(points), loc="best")
        # Models of lightspine and the Pareto front are labeled first.
        order = sorted(points, key=lambda point: (point.family is None, point not in front))
        return figure, _place_labels(figure, axes, order)


def pareto_front(points: Sequence[ScatterPoint]) -> list[int]:
    """Return the indices of the Pareto-optimal points in latency and accuracy, fastest first.

    Of equal points only the first is returned.
    """
    front: list[int] = []
    for index, point in sorted(
        enumerate(points), key=lambda item: (item[1].latency_ms, -item[1].accuracy, item[0])
    ):
        if not front or point.accuracy > points[front[-1]].accuracy:
            front.append(index)
    return front


def _set_axes(axes: Axes, points: Sequence[ScatterPoint]) -> None:
    set_log_scale(axes, "x")
    # Span a factor of four or more, so that similar latencies look similar; leave room for labels.
    latencies = [point.latency_ms for point in points]
    spread = math.sqrt(max(4.0 * min(latencies) / max(latencies), 1.0))
    axes.set_xlim(min(latencies) / (1.12 * spread), max(latencies) * 1.35 * spread)
    accuracies = [point.accuracy for point in points]
    margin = 0.08 * max(max(accuracies) - min(accuracies), 2.0)
    axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.grid()


def _legend_handles(points: Sequence[ScatterPoint]) -> list[Line2D]:
    families = sorted({point.family for point in points if point.family is not None})
    groups: list[str | None] = [*families, *([None] if any(point.family is None for point in points) else [])]
    handles = []
    for family in groups:
        marker = family_marker(family)
        face = COLORS["background"].light if family is None else marker.color
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker=marker.symbol,
                color=marker.color,
                markerfacecolor=face,
                label=family or "timm",
            )
        )
    return handles


class _LabelPosition(NamedTuple):
    """A label box and the boxes along its leader, each a row (x0, y0, x1, y1) in pixels."""

    box: np.ndarray
    leader: np.ndarray

    def count_overlaps(self, occupied: np.ndarray) -> tuple[int, int]:
        """Return how many occupied boxes the label covers and how often its leader touches one."""
        return _count_overlaps(self.box, occupied), _count_overlaps(self.leader, occupied)


def _place_labels(figure: Figure, axes: Axes, points: Sequence[ScatterPoint]) -> list[str]:
    """Draw each label at the first free position around its marker; return the labels that did not fit.

    The layout of the figure is fixed afterwards. At 72 dots per inch a pixel is a point.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    centers = axes.transData.transform([(point.latency_ms, point.accuracy) for point in points])
    radii = np.sqrt([point.area for point in points]) / 2
    occupied = _squares(centers, radii[:, None])
    if (legend := axes.get_legend()) is not None:
        occupied = np.vstack([occupied, legend.get_window_extent().extents])
    unplaced = []
    for (x, y), radius, point in zip(centers, radii, points, strict=True):
        text = axes.annotate(
            point.label,
            (point.latency_ms, point.accuracy),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.2,
            color=COLORS["text" if point.family else "muted"].light,
            fontweight="bold" if point.family else "normal",
            bbox={"facecolor": COLORS["background"].light, "edgecolor": "none", "alpha": 0.8, "pad": 0.4},
            zorder=6,
        )
        extent = text.get_window_extent()
        candidates = _label_positions(x, y, radius, extent.width, extent.height, frame)
        position = _choose_position(candidates, occupied, keep=point.keep_label)
        if position is None:
            text.remove()
            unplaced.append(point.label)
            continue
        x0, y0, x1, y1 = position.box[0]
        text.set_position(((x0 + x1) / 2 - x, (y0 + y1) / 2 - y))
        occupied = np.vstack([occupied, position.box, position.leader])
        if len(position.leader):
            ends = position.leader[[0, -1]].reshape(2, 2, 2).mean(axis=1)
            line = axes.transData.inverted().transform(ends)
            axes.add_line(Line2D(*line.T, color=COLORS["muted"].light, linewidth=0.5, zorder=2))
    return unplaced


def _choose_position(
    candidates: Iterable[_LabelPosition], occupied: np.ndarray, *, keep: bool
) -> _LabelPosition | None:
    """Return the first free position, or for `keep` the one with the fewest overlaps."""
    best, fewest = None, None
    for candidate in candidates:
        overlaps = candidate.count_overlaps(occupied)
        if overlaps == (0, 0):
            return candidate
        if keep and (fewest is None or overlaps < fewest):
            best, fewest = candidate, overlaps
    return best


def _label_positions(
    x: float, y: float, radius: float, width: float, height: float, frame: Bbox
) -> Iterator[_LabelPosition]:
    """Yield the positions around a marker where a label lies inside the frame, nearest first."""
    for distance in _DISTANCES:
        for angle in _ANGLES:
            direction = np.round([math.cos(math.radians(angle)), math.sin(math.radians(angle))], 6)
            # `distance` is measured from the marker to the nearest edge of the label.
            edge = (x, y) + direction * (radius + distance)
            half = np.array([width, height]) / 2
            center = edge + np.sign(direction) * half
            box = np.array([[*(center - half), *(center + half)]])
            if (box[0, :2] < frame.min).any() or (box[0, 2:] > frame.max).any():
                continue
            steps = np.linspace(1.5, distance, round(distance / 2) + 1 if distance >= _LEADER_FROM else 0)
            yield _LabelPosition(box, _squares((x, y) + direction * (radius + steps[:, None]), _MARGIN))


def _count_overlaps(boxes: np.ndarray, occupied: np.ndarray) -> int:
    """Count the pairs of boxes that share more than an edge."""
    first = boxes[:, None]
    apart = (first[..., :2] >= occupied[:, 2:]) | (occupied[:, :2] >= first[..., 2:])
    return int((~apart.any(axis=2)).sum())


def _squares(centers: np.ndarray, half: float | np.ndarray) -> np.ndarray:
    return np.hstack([centers - half, centers + half])
