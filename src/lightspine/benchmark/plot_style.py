"""Style of the benchmark plots: fonts, colors for light and dark pages, markers of the model families."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightspine.models import find_record, list_models


class Color(NamedTuple):
    """A color for light backgrounds (image files, light pages) and for dark pages."""

    light: str
    dark: str


# All light colors differ: the HTML report identifies the colors of a chart by them.
COLORS = {
    "background": Color("#ffffff", "#15181c"),
    "text": Color("#1b1f24", "#e9ebee"),
    "muted": Color("#5a6370", "#a5afba"),
    "grid": Color("#e2e5e9", "#323940"),
    "peer": Color("#6e7681", "#98a2ae"),
    "accent": Color("#1f5fb0", "#79b2ff"),
    "published": Color("#8a6d1d", "#d9bb62"),
    "bad": Color("#b3261e", "#ff8a80"),
    "family-0": Color("#b45309", "#f5a657"),
    "family-1": Color("#0b7a6b", "#4fd0bb"),
    "family-2": Color("#7c3aad", "#c99cf3"),
    "family-3": Color("#c2255c", "#ff8db0"),
    "family-4": Color("#1d5fc4", "#82b6ff"),
    "family-5": Color("#4d7c0f", "#a9d45f"),
    "family-6": Color("#334155", "#b6c3d6"),
}
_FAMILY_MARKERS = "sD^vohp"
_WIDTH_INCHES = 7.6
_RC_PARAMS = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "text.color": COLORS["text"].light,
    "axes.labelcolor": COLORS["text"].light,
    "axes.edgecolor": COLORS["muted"].light,
    "xtick.color": COLORS["muted"].light,
    "ytick.color": COLORS["muted"].light,
    "xtick.labelcolor": COLORS["text"].light,
    "ytick.labelcolor": COLORS["text"].light,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": COLORS["background"].light,
    "grid.color": COLORS["grid"].light,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "lines.linewidth": 1.3,
    # Dollar signs in model names do not start a formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lightspine",
    "axes.formatter.use_mathtext": False,
}


class Marker(NamedTuple):
    """Color and marker symbol of a model family."""

    color: str
    symbol: str


PEER_MARKER = Marker(COLORS["peer"].light, "o")


@contextmanager
def plot_style() -> Iterator[None]:
    """Use the style of the benchmark plots within a block, independent of the user's matplotlib settings."""
    with style.context(["default", _RC_PARAMS]):
        yield


def new_figure(height: float, *, title: str, note: str) -> Figure:
    """Return an empty figure.

    Args:
        height: in inches.
        title: above the plot.
        note: in small print below the plot, such as the conditions of the measurement.
    """
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=72, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=7.2, color=COLORS["muted"].light)
    return figure


def family_marker(family: str | None) -> Marker:
    """Return the marker of one of our families, or that of all other models for `None`.

    Families that this version does not have share the last color.
    """
    if family is None:
        return PEER_MARKER
    known = sorted({record.family for name in list_models() if (record := find_record(name))})
    index = known.index(family) if family in known else -1
    count = len(_FAMILY_MARKERS)
    return Marker(COLORS[f"family-{index % count}"].light, _FAMILY_MARKERS[index % count])


def set_log_scale(axes: Axes, which: str) -> None:
    """Make the "x" or "y" axis logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
