"""Writes labels beside the markers of a chart, where `labels.py` finds room."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightspine.benchmark.report.charts.labels import Box, place_labels
from lightspine.benchmark.report.charts.style import INKS

_PAD_PT = 0.6


class Label(NamedTuple):
    """What to write beside which point.

    Attributes:
        text: the words.
        x: place of the point in the axes' data.
        y: the same.
        colour: of the words.
        bold: whether they are to stand out.
    """

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False


def write_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[Label],
    *,
    marker_pt: float,
    size: float,
    line: Sequence[tuple[float, float]] = (),
) -> int:
    """Write the labels that find room, the first ones first, and return how many did not.

    The figure must be drawn at 72 dots per inch; its layout is fixed from here on.

    Args:
        figure: the chart.
        axes: where the points are.
        labels: all points, also those whose label may be left out.
        marker_pt: diameter of a marker in points.
        size: of the letters in points.
        line: corners, in the axes' data, of a line that the labels keep off if they can.
    """
    canvas = FigureCanvasAgg(figure)
    # Where things are is known once the layout has been done, and the labels must not move it again.
    canvas.draw()
    figure.set_layout_engine("none")
    centres = axes.transData.transform([(label.x, label.y) for label in labels])
    texts = [
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            color=label.colour,
            fontsize=size,
            fontweight="bold" if label.bold else "normal",
            zorder=6,
            bbox={"facecolor": INKS["paper"].light, "edgecolor": "none", "alpha": 0.75, "pad": 0.4},
        )
        for label in labels
    ]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    half = marker_pt / 2
    places = place_labels(
        [Box(x - half, y - half, x + half, y + half) for x, y in centres],
        [(extent.width + 2 * _PAD_PT, extent.height + 2 * _PAD_PT) for extent in extents],
        Box(*axes.get_window_extent().extents),
        _segments(axes, line),
    )
    for text, (x, y), place in zip(texts, centres, places, strict=True):
        if place is None:
            text.remove()
            continue
        centre_x, centre_y = place.box.centre
        text.set_position((centre_x - x, centre_y - y))
        if place.leader is not None:
            (x0, y0), (x1, y1) = axes.transData.inverted().transform(place.leader)
            axes.add_line(Line2D([x0, x1], [y0, y1], color=INKS["muted"].light, linewidth=0.5, zorder=2))
    return places.count(None)


def _segments(axes: Axes, line: Sequence[tuple[float, float]]) -> list[Box]:
    """Return a flat box for each piece of a line that runs level or upright."""
    corners = [axes.transData.transform(corner) for corner in line]
    return [
        Box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)).grown(0.4)
        for (x0, y0), (x1, y1) in pairwise(corners)
    ]
