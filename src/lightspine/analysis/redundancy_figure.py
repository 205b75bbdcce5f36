"""The picture of the heads: how alike they are, what they read, what each is worth."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from lightspine.analysis.sheet import COLOURS, new_figure

if TYPE_CHECKING:
    from lightspine.analysis.head_redundancy import RedundancyResult

_SHOWN_LAYERS = 3
_MOST_HEADS = 8


def draw_redundancy(result: "RedundancyResult") -> Figure:
    """Draw similarity and score changes by layer, and the heads of three layers with their maps."""
    layers = sorted({0, len(result.modules) // 2, len(result.modules) - 1})[:_SHOWN_LAYERS]
    heads = min(max(len(result.similarity[layer]) for layer in layers), _MOST_HEADS)
    figure = new_figure(max(7.4, 1.15 * (heads + 2)), 2.6 + 1.25 * len(layers))
    figure.set_layout_engine("constrained")
    parts = figure.subfigures(2, 1, height_ratios=[2.2, 1.25 * len(layers)], squeeze=False)
    top, bottom = parts[0, 0], parts[1, 0]
    top.suptitle(f"{result.subject}: the heads of its attention", fontsize=10.5, x=0.01, ha="left")
    bars = top.subplots(1, 2 if result.changes else 1, squeeze=False)[0]
    _draw_similarity(bars[0], result)
    if result.changes:
        _draw_changes(bars[1], result)
    grid = GridSpec(len(layers), heads + 1, figure=bottom)
    for row, layer in enumerate(layers):
        matrix = bottom.add_subplot(grid[row, 0])
        matrix.imshow(result.similarity[layer], cmap="Greys", vmin=0, vmax=1)
        _bare(matrix, f"{_short(result.modules[layer])}\ncosines")
        for head in range(min(len(result.maps[layer]), heads)):
            axes = bottom.add_subplot(grid[row, head + 1])
            axes.imshow(result.maps[layer][head], cmap=COLOURS, vmin=0)
            _bare(axes, f"head {head}")
    return figure


def _draw_similarity(axes: Axes, result: "RedundancyResult") -> None:
    axes.bar(range(len(result.modules)), result.mean_similarity(), color="0.45", width=0.7)
    images = "1 image" if result.images == 1 else f"{result.images} images"
    axes.set_title(f"mean cosine between two heads, {images}", fontsize=9)
    axes.set_ylim(0, 1)
    _label_layers(axes, result)


def _draw_changes(axes: Axes, result: "RedundancyResult") -> None:
    for layer, changes in enumerate(result.changes):
        axes.plot(np.full(len(changes), layer), changes, "o", color="black", markersize=4, alpha=0.55)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_title(
        f"top-1 without one head minus {result.top1:.1f} %, points, {result.labelled} images", fontsize=9
    )
    _label_layers(axes, result)


def _label_layers(axes: Axes, result: "RedundancyResult") -> None:
    count = len(result.modules)
    axes.set_xticks(range(count), [_short(name) for name in result.modules], rotation=45 if count > 3 else 0)
    axes.set_xlim(-0.6, count - 0.4)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _bare(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=7.5, pad=2)


def _short(module: str) -> str:
    return module.removesuffix(".attn")
