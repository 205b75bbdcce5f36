"""The picture of receptive fields: heat maps on a logarithmic scale, and how fast squares gather them."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightspine.analysis.sheet import COLOURS, new_figure

if TYPE_CHECKING:
    from lightspine.analysis.receptive_field import ErfResult

_DECADES = 4
_HALF = 0.5
_LINES = {"untrained": ("0.55", "--"), "trained": ("black", "-")}


def draw_erf(result: "ErfResult") -> Figure:
    """Draw one heat map per field on one scale, with the square of half the contribution, and the curves."""
    count = len(result.fields)
    figure = new_figure(2.65 * count + 4.3, 3.15)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, count + 1, width_ratios=[1.0] * count + [1.25], squeeze=False)[0]
    # The peak differs by orders of magnitude between networks: each map is told relative to its own.
    for axis, field in zip(axes, result.fields, strict=False):
        relative = field.contribution / field.contribution.max()
        image = axis.imshow(
            np.maximum(relative, 10.0**-_DECADES),
            cmap=COLOURS,
            norm=LogNorm(10.0**-_DECADES, 1),
            extent=(0, relative.shape[1], relative.shape[0], 0),
            interpolation="nearest",
        )
        side, (y, x) = field.side_of(_HALF), field.centre
        axis.add_patch(
            Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor="white", linewidth=1.1)
        )
        axis.set_title(f"{field.state}: half within {side} px", fontsize=9)
        axis.set_xticks([0, relative.shape[1]])
        axis.set_yticks([0, relative.shape[0]])
        axis.tick_params(labelsize=7, length=2)
    bar = figure.colorbar(image, ax=list(axes[:count]), fraction=0.05, pad=0.02)
    bar.set_label("contribution of a pixel / the largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    curves = axes[-1]
    for field in result.fields:
        colour, style = _LINES[field.state]
        curves.plot(field.sides, 100 * field.shares, style, color=colour, label=field.state, linewidth=1.6)
    curves.set_xlim(0, max(int(field.sides[-1]) for field in result.fields))
    curves.set_ylim(0, 100)
    curves.set_xlabel("side of the centred square, px", fontsize=8)
    curves.set_ylabel("contribution within it, %", fontsize=8)
    curves.tick_params(labelsize=7)
    curves.grid(color="0.88", linewidth=0.6)
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(fontsize=8, frameon=False, loc="lower right")
    images = "1 image" if result.images == 1 else f"{result.images} images"
    figure.suptitle(
        f"{result.subject}, effective receptive field of the centre of {result.module}, {images}",
        fontsize=10.5,
        x=0.01,
        ha="left",
    )
    return figure
