"""Figures of the analyses: a grid of images and maps in one style.

matplotlib is imported only when a figure is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightspine.analysis.image_input import ImageInput
from lightspine.utils.printable import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Its lightness increases monotonically, so the order of values survives a grayscale print.
COLORMAP = "magma"

_PANEL_INCHES = 1.75
_TITLE_INCHES = 0.27
_HEAD_INCHES = 0.3
_FOOT_INCHES = 0.3
_MARGIN_INCHES = 0.12
_NAME_INCHES = 0.3


@dataclass(frozen=True)
class Panel:
    """One image or map of a figure.

    Attributes:
        title: text above the panel.
        values: a map (h, w), drawn on a scale from 0 to its maximum, or an RGB image (H, W, 3).
        over: draw the map half transparent over this image.
        mark: (y, x) in pixels of the image, drawn as a cross.
        size: height and width in pixels that the map covers; by default those of the image or map.
        sqrt_scale: scale the brightness by the square root, for maps with a few large values.
    """

    title: str
    values: np.ndarray
    over: ImageInput | None = None
    mark: tuple[float, float] | None = None
    size: tuple[int, int] | None = None
    sqrt_scale: bool = False

    def extent(self) -> tuple[int, int]:
        """Return the height and width in pixels that the panel covers."""
        if self.size is not None:
            return self.size
        if self.over is not None:
            return self.over.size
        height, width = self.values.shape[:2]
        return height, width


def new_figure(width: float, height: float) -> "Figure":
    """Create an empty figure without a window; width and height are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def draw_grid(
    rows: Sequence[Sequence[Panel | None]], *, names: Sequence[str] = (), heading: str, caption: str
) -> "Figure":
    """Draw rows of panels.

    Args:
        rows: the panels; `None` leaves a cell empty.
        names: one label per row, drawn to its left.
        heading: text above the figure.
        caption: small text below the figure.
    """
    count = max(map(len, rows))
    ratios = [_aspect_ratio(row) for row in rows]
    left = _MARGIN_INCHES + (_NAME_INCHES if names else 0)
    cell = _PANEL_INCHES + _MARGIN_INCHES
    width = max(left + count * cell, 0.056 * len(caption), 0.08 * len(heading)) + _MARGIN_INCHES
    height = _HEAD_INCHES + sum(_PANEL_INCHES * ratio + _TITLE_INCHES for ratio in ratios) + _FOOT_INCHES
    figure = new_figure(width, height)
    figure.text(_MARGIN_INCHES / width, 1 - 0.2 / height, figure_text(heading), fontsize=10.5, va="center")
    figure.text(
        _MARGIN_INCHES / width, 0.08 / height, figure_text(caption), fontsize=7.5, va="bottom", color="0.25"
    )
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
            name = names[number] if len(names[number]) <= 24 else f"{names[number][:23]}…"
            shown = figure_text(name)
            figure.text(0.18 / width, middle, shown, rotation=90, ha="center", va="center", fontsize=8)
        top = bottom
    return figure


def draw_panel(axes: "Axes", panel: Panel) -> None:
    """Draw one panel."""
    from matplotlib.colors import PowerNorm

    height, width = panel.extent()
    place = (0.0, float(width), float(height), 0.0)
    if panel.values.ndim == 3:
        axes.imshow(panel.values, extent=place, interpolation="nearest")
    else:
        # The maximum of a map of zeros cannot be the upper end of its scale.
        largest = float(panel.values.max()) or 1.0
        opacity = 1.0
        if panel.over is not None:
            # The low contrast of the image leaves brightness to the map.
            axes.imshow(panel.over.display.mean(axis=2), cmap="gray", vmin=-255, vmax=510, extent=place)
            opacity = 0.6
        axes.imshow(
            panel.values,
            cmap=COLORMAP,
            norm=PowerNorm(0.5 if panel.sqrt_scale else 1.0, vmin=0, vmax=largest),
            alpha=opacity,
            extent=place,
            interpolation="nearest" if panel.over is None else "bilinear",
        )
    if panel.mark is not None:
        # A white cross with a black outline is visible on every background.
        for color, line in (("black", 2.6), ("white", 1.1)):
            axes.plot([panel.mark[1]], [panel.mark[0]], "+", color=color, markersize=9, markeredgewidth=line)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
    axes.set_title(figure_text(panel.title), fontsize=8, pad=3)


def _aspect_ratio(row: Sequence[Panel | None]) -> float:
    # All panels of a row show the same image. The limits keep very long images readable.
    height, width = next(panel.extent() for panel in row if panel is not None)
    return min(max(height / width, 0.3), 2.5)
