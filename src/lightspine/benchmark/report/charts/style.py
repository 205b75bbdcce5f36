"""How every chart of a report looks: sizes, inks, and the marks that tell things apart without colour."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from lightspine.models import find_record, list_models


class Ink(NamedTuple):
    """A colour: as drawn in files, and as the page shows it on a dark ground."""

    light: str
    dark: str


# The light ones differ from each other, since the page finds its colours in a drawing by them.
INKS = {
    "paper": Ink("#ffffff", "#15181c"),
    "ink": Ink("#1b1f24", "#e9ebee"),
    "muted": Ink("#5a6370", "#a5afba"),
    "grid": Ink("#e2e5e9", "#323940"),
    "peer": Ink("#6e7681", "#98a2ae"),
    "accent": Ink("#1f5fb0", "#79b2ff"),
    "published": Ink("#8a6d1d", "#d9bb62"),
    "bad": Ink("#b3261e", "#ff8a80"),
}
_FAMILY_INKS = (
    Ink("#b45309", "#f5a657"),
    Ink("#0b7a6b", "#4fd0bb"),
    Ink("#7c3aad", "#c99cf3"),
    Ink("#c2255c", "#ff8db0"),
    Ink("#1d5fc4", "#82b6ff"),
    Ink("#4d7c0f", "#a9d45f"),
    Ink("#334155", "#b6c3d6"),
)
_FAMILY_MARKERS = "sD^vohp"
PEER_MARKERS = "XPd*<>8H"
DASHES: tuple[object, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.4)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1.5, 1, 1.5, 1, 1.5)),
)


class Mark(NamedTuple):
    """How one family is drawn."""

    colour: str
    marker: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The paper a chart is drawn on.

    Attributes:
        width: in inches.
        narrow: for a telephone: things that stand side by side elsewhere stand below each other.
        titled: the title is in the picture; on the page it is text above it.
    """

    width: float
    narrow: bool = False
    titled: bool = False


FILE = Layout(width=7.6, titled=True)
WIDE = Layout(width=7.6)
NARROW = Layout(width=3.8, narrow=True)

_SETTINGS = {
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "text.color": INKS["ink"].light,
    "axes.labelcolor": INKS["ink"].light,
    "axes.edgecolor": INKS["muted"].light,
    "xtick.color": INKS["muted"].light,
    "ytick.color": INKS["muted"].light,
    "xtick.labelcolor": INKS["ink"].light,
    "ytick.labelcolor": INKS["ink"].light,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": INKS["paper"].light,
    "grid.color": INKS["grid"].light,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "lines.linewidth": 1.3,
    # A dollar sign in a name out of a file is a dollar sign.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lightspine",
    "axes.formatter.use_mathtext": False,
}


@contextmanager
def report_style() -> Iterator[None]:
    """Draw and save in the style of the report, whatever the user's matplotlib is set to."""
    with style.context(["default", _SETTINGS]):
        yield


def new_figure(layout: Layout, height: float, title: str, conditions: str) -> Figure:
    """Return an empty figure of a layout.

    Args:
        layout: tells the width, and whether title and conditions are in the picture.
        height: in inches, without the title.
        title: what is shown.
        conditions: under which it was measured.
    """
    figure = Figure(figsize=(layout.width, height + 0.5 * layout.titled), dpi=72, layout="constrained")
    FigureCanvasAgg(figure)
    if layout.titled:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(
            f"Measured by lightspine bench: {conditions}",
            x=0.01,
            ha="left",
            fontsize=6.8,
            color=INKS["muted"].light,
        )
    return figure


def families() -> tuple[str, ...]:
    """Return our families in the order of their colours."""
    return tuple(sorted({record.family for name in list_models() if (record := find_record(name))}))


def family_mark(family: str) -> Mark:
    """Return colour and marker of a family of ours; families this version lacks share the last."""
    known = families()
    index = known.index(family) if family in known else len(_FAMILY_INKS) - 1
    return Mark(_FAMILY_INKS[index % len(_FAMILY_INKS)].light, _FAMILY_MARKERS[index % len(_FAMILY_MARKERS)])


def page_inks() -> dict[str, Ink]:
    """Return every colour that the page names, by the name of its variable."""
    return INKS | {f"family-{index}": ink for index, ink in enumerate(_FAMILY_INKS)}


def log_axis(axes: Axes, which: str, *, many: bool = True) -> None:
    """Make an axis logarithmic with plain numbers at 1, 2 and 5; `many=False` labels powers of ten only."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if many else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def fixed_ticks(axes: Axes, which: str, places: Sequence[float], names: Sequence[str]) -> None:
    """Put ticks exactly where things were measured."""
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_ticklabels(list(names))


def below_axis(axes: Axes) -> Transform:
    """Return the place of a legend below the horizontal axis and its name, whatever the axes' height."""
    return axes.transAxes + ScaledTranslation(-30 / 72, -44 / 72, axes.figure.dpi_scale_trans)
