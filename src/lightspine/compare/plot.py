"""The picture of a comparison: accuracy against latency, one marker per model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from lightspine.errors import UsageError

# Shapes tell the models apart on grey paper; colour only adds to them.
_MARKERS = "os^Dvph8<>"
_COLOURS = ("#1b4f72", "#d68910", "#1e8449", "#922b21", "#7d3c98", "#148f77", "#797d7f")
# Where a label may stand beside its marker, best first, and how far from the marker's edge, in points.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES_PT = (4.0, 14.0, 26.0, 40.0)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in the picture.

    Attributes:
        name: model name, written beside the marker.
        latency_ms: place on the horizontal, logarithmic axis.
        accuracy: place on the vertical axis, in percent.
        params: number of parameters; the marker's area grows with it.
    """

    name: str
    latency_ms: float
    accuracy: float
    params: int

    @property
    def area(self) -> float:
        """Area of the marker in square points; the smallest model stays visible."""
        return 40.0 + 6.0 * self.params / 1e6


def plot_accuracy_against_latency(points: Sequence[Point], path: Path, *, title: str, caption: str) -> Figure:
    """Draw accuracy against latency and save the picture as PNG.

    Args:
        points: the models.
        path: the PNG file.
        title: what was compared.
        caption: how it was measured, in small print below.

    Raises:
        UsageError: there is no point to draw.
    """
    if not points:
        raise UsageError("a plot needs at least one finished model, got none")
    figure = Figure(figsize=(8.0, 5.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, point in enumerate(points):
        axes.scatter(
            [point.latency_ms],
            [point.accuracy],
            s=point.area,
            marker=_MARKERS[index % len(_MARKERS)],
            color=_COLOURS[index % len(_COLOURS)],
            edgecolors="black",
            linewidths=0.8,
            alpha=0.85,
            # A small marker stays visible on top of a large one.
            zorder=3 + 1 / point.area,
        )
    _set_axes(axes, points)
    axes.set_title(title, loc="left", fontsize=12)
    figure.supxlabel(f"{caption}; a marker's area grows with the parameters", x=0.01, ha="left", fontsize=7.5)
    # Positions in pixels are known once the layout has been done, and the labels must not move it again.
    canvas.draw()
    figure.set_layout_engine("none")
    _place_labels(axes, canvas, points)
    figure.savefig(path)
    return figure


def _set_axes(axes: Axes, points: Sequence[Point]) -> None:
    latencies = [point.latency_ms for point in points]
    accuracies = [point.accuracy for point in points]
    axes.set_xscale("log")
    # At least a decade, so that near models look near.
    slack = max(1.0, (10 * min(latencies) / max(latencies)) ** 0.5)
    axes.set_xlim(min(latencies) / max(1.6, slack), max(latencies) * max(1.9, slack))
    margin = max(0.25 * (max(accuracies) - min(accuracies)), 0.5)
    # A little above 100 so that a perfect model's marker is not cut.
    axes.set_ylim(min(accuracies) - margin, min(max(accuracies) + margin, 100 + margin / 2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value <= 100 else ""))
    axes.set_xlabel("latency of one image, median, in ms (lower is better)")
    axes.set_ylabel("accuracy on held-out images, in %")
    axes.grid(color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _place_labels(axes: Axes, canvas: FigureCanvasAgg, points: Sequence[Point]) -> None:
    pixels_per_pt = canvas.figure.dpi / 72
    markers = [_marker_box(axes, point, pixels_per_pt) for point in points]
    taken, frame = list(markers), axes.get_window_extent()
    for point, marker in zip(points, markers, strict=True):
        text = axes.annotate(
            f"{point.name}  {point.params / 1e6:.1f}M",
            (point.latency_ms, point.accuracy),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.6},
        )
        extent = text.get_window_extent(canvas.get_renderer())
        box, distance = _best_place(extent.width, extent.height, marker, taken, frame, pixels_per_pt)
        centre_x, centre_y = (marker.x0 + marker.x1) / 2, (marker.y0 + marker.y1) / 2
        shift_x, shift_y = (box.x0 + box.x1) / 2 - centre_x, (box.y0 + box.y1) / 2 - centre_y
        text.set_position((shift_x / pixels_per_pt, shift_y / pixels_per_pt))
        taken.append(box)
        if distance > _DISTANCES_PT[0]:
            # Only a label that had to move away needs a line to its marker.
            line = FancyArrowPatch(
                (centre_x, centre_y),
                (centre_x + shift_x, centre_y + shift_y),
                arrowstyle="-",
                color="#888888",
                linewidth=0.6,
                transform=None,
                zorder=5,
            )
            axes.add_artist(line)


def _marker_box(axes: Axes, point: Point, pixels_per_pt: float) -> Bbox:
    x, y = axes.transData.transform((point.latency_ms, point.accuracy))
    radius = point.area**0.5 / 2 * pixels_per_pt
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _best_place(
    width: float, height: float, marker: Bbox, taken: Sequence[Bbox], frame: Bbox, pixels_per_pt: float
) -> tuple[Bbox, float]:
    """Return the box of a label, in pixels, that covers the least of what is drawn, and its distance."""
    centre_x, centre_y = (marker.x0 + marker.x1) / 2, (marker.y0 + marker.y1) / 2
    candidates: list[tuple[float, Bbox, float]] = []
    for distance in _DISTANCES_PT:
        gap = marker.width / 2 + distance * pixels_per_pt
        for dx, dy in _DIRECTIONS:
            x, y = centre_x + dx * (gap + width / 2), centre_y + dy * (gap + height / 2)
            box = Bbox.from_extents(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            covered = sum(_shared_area(box, other) for other in taken)
            outside = width * height - _shared_area(box, frame)
            candidates.append((round(covered + outside), box, distance))
    # The first of equals wins: nearest, then by the order of the directions.
    _, box, distance = min(candidates, key=lambda candidate: candidate[0])
    return box, distance


def _shared_area(first: Bbox, second: Bbox) -> float:
    shared = Bbox.intersection(first, second)
    return 0.0 if shared is None else float(shared.width * shared.height)
