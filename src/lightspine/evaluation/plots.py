"""The confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from lightspine.errors import UsageError
from lightspine.utils.files import atomic_write

MOST_CLASSES = 50
"""With more classes neither names nor cells can be read on a page."""

_NUMBERED = 25
_NAME_LETTERS = 22


def plot_confusion_matrix(
    confusion: ArrayLike, names: Sequence[str], path: Path, *, title: str, counted: str = "images"
) -> None:
    """Draw the share of every true class (row) that was taken for each class (column), in grey, as PNG.

    Args:
        confusion: (classes, classes) counts; rows are true classes, columns predicted ones.
        names: of the classes.
        path: the PNG file.
        title: what was scored.
        counted: what the counts are of.

    Raises:
        UsageError: more than 50 classes, or not as many names as rows.
        LightspineError: the file cannot be written.
    """
    count, counts = len(names), np.asarray(confusion)
    if count > MOST_CLASSES or counts.shape != (count, count):
        raise UsageError(
            f"expected a square matrix of at most {MOST_CLASSES} classes with as many names, got "
            f"{'x'.join(map(str, counts.shape))} and {count} names"
        )
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * counts / np.maximum(totals, 1)
    side = max(4.2, (0.5 if count <= _NUMBERED else 0.3) * count)
    figure = Figure(figsize=(side + 2.6, side + 2.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # By the square root: a confusion of one in a hundred is seen beside a class that is nearly always right.
    scale = PowerNorm(0.5, vmin=0, vmax=100)
    image = axes.imshow(shares, cmap="Greys", norm=scale, interpolation="nearest")
    shown = [_shorten(name) for name in names]
    axes.set_xticks(range(count), shown, rotation=90 if max(map(len, shown)) > 2 else 0)
    axes.set_yticks(
        range(count), [f"{name} ({total})" for name, total in zip(shown, totals[:, 0], strict=True)]
    )
    axes.tick_params(labelsize=8 if count <= _NUMBERED else 6.5, length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel(f"true ({counted})")
    axes.set_title(title, loc="left", fontsize=11)
    # Thin lines between the cells: white ones would vanish beside empty cells.
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.8", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    if count <= _NUMBERED:
        _write_numbers(axes, shares, counts)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, ticks=[0, 1, 5, 10, 20, 40, 60, 80, 100])
    bar.set_label("% of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _write_numbers(axes: Axes, shares: np.ndarray, counts: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = shares[row, column]
        text = f"{share:.0f}" if share >= 0.5 else "<1"
        axes.text(
            column, row, text, ha="center", va="center", fontsize=8, color="white" if share > 25 else "black"
        )


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 1] + "…"
