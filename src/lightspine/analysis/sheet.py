"""The one style of the figures: a colour scale that also reads in grey, a grey image below an overlay."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from lightspine.analysis.results import Panel

# Its lightness only grows, so it keeps its order on grey paper.
COLOURS = "magma"

_PANEL_INCHES = 1.75
_TITLE_INCHES = 0.27
_HEAD_INCHES = 0.3
_FOOT_INCHES = 0.3
_MARGIN_INCHES = 0.12
_NAME_INCHES = 0.3


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches that belongs to no window."""
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def draw_sheet(
    rows: Sequence[Sequence[Panel | None]], *, names: Sequence[str] = (), heading: str, caption: str
) -> Figure:
    """Draw rows of panels.

    Args:
        rows: the panels; `None` leaves a place empty.
        names: one per row, written beside it; none by default.
        heading: above the figure.
        caption: small print below it.
    """
    count = max(map(len, rows))
    ratios = [_ratio(row) for row in rows]
    left = _MARGIN_INCHES + (_NAME_INCHES if names else 0)
    cell = _PANEL_INCHES + _MARGIN_INCHES
    width = max(left + count * cell, 0.056 * len(caption), 0.08 * len(heading)) + _MARGIN_INCHES
    height = _HEAD_INCHES + sum(_PANEL_INCHES * ratio + _TITLE_INCHES for ratio in ratios) + _FOOT_INCHES
    figure = new_figure(width, height)
    figure.text(_MARGIN_INCHES / width, 1 - 0.2 / height, heading, fontsize=10.5, va="center")
    figure.text(_MARGIN_INCHES / width, 0.08 / height, caption, fontsize=7.5, va="bottom", color="0.25")
    top = height - _HEAD_INCHES
    for number, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        bottom = top - _TITLE_INCHES - _PANEL_INCHES * ratio
        for column, panel in enumerate(row):
            if panel is not None:
                x = left + column * cell
                box = (x / width, bottom / height, _PANEL_INCHES / width, _PANEL_INCHES * ratio / height)
                draw_panel(figure.add_axes(box), panel)
        if names:
            middle = (bottom + _PANEL_INCHES * ratio / 2) / height
            name = _shorten(names[number])
            figure.text(0.18 / width, middle, name, rotation=90, ha="center", va="center", fontsize=8)
        top = bottom
    return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw one panel into its axes."""
    height, width = _extent(panel)
    place = (0.0, float(width), float(height), 0.0)
    if panel.values.ndim == 3:
        axes.imshow(panel.values, extent=place, interpolation="nearest")
    else:
        # A constant zero map has no scale of its own.
        most = float(panel.values.max()) or 1.0
        opacity = 1.0
        if panel.over is not None:
            # With little contrast, so that brightness tells of the map.
            axes.imshow(panel.over.shown.mean(axis=2), cmap="gray", vmin=-255, vmax=510, extent=place)
            opacity = 0.6
        smooth = "nearest" if panel.over is None else "bilinear"
        axes.imshow(
            panel.values,
            cmap=COLOURS,
            norm=PowerNorm(0.5 if panel.root else 1.0, vmin=0, vmax=most),
            alpha=opacity,
            extent=place,
            interpolation=smooth,
        )
    if panel.mark is not None:
        _draw_mark(axes, *panel.mark)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    axes.set_title(panel.title, fontsize=8, pad=3)


def _draw_mark(axes: Axes, y: float, x: float) -> None:
    # White on black is seen on every ground.
    for colour, width in (("black", 2.6), ("white", 1.1)):
        axes.plot([x], [y], "+", color=colour, markersize=9, markeredgewidth=width)


def _extent(panel: Panel) -> tuple[int, int]:
    if panel.size is not None:
        return panel.size
    if panel.over is not None:
        return panel.over.size
    height, width = panel.values.shape[:2]
    return height, width


def _ratio(row: Sequence[Panel | None]) -> float:
    # All panels of a row show the same image; a strip stays readable.
    height, width = next(_extent(panel) for panel in row if panel is not None)
    return min(max(height / width, 0.3), 2.5)


def _shorten(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
