"""Contact sheet: held-out images with the true label and the prediction of each model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lightspine.errors import UsageError
from lightspine.evaluation import ClassScore
from lightspine.utils.files import atomic_write
from lightspine.utils.printable import figure_text

_CELL_INCHES = 1.25
_NAME_INCHES = 1.9
_ROW_INCHES = 0.42
_LABEL_LETTERS = 14


def draw_contact_sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    predictions: Mapping[str, Sequence[ClassScore]],
    path: Path,
    *,
    title: str,
) -> Figure:
    """Draw a contact sheet: one column per image, one row per model, with a frame around wrong predictions.

    Args:
        images: the images before preprocessing.
        labels: the true class of each image.
        predictions: by model, the top-1 class of each image.
        path: the PNG file.
        title: above the images.

    Raises:
        UsageError: there is no image, or a label or prediction is missing.
    """
    count = len(images)
    if not count or any(len(answers) != count for answers in predictions.values()) or len(labels) != count:
        received = {name: len(answers) for name, answers in predictions.items()}
        raise UsageError(
            f"expected a label and a prediction for each of {count} images, got {len(labels)} and {received}"
        )
    width = _NAME_INCHES + count * _CELL_INCHES + 0.1
    height = 0.45 + _CELL_INCHES + _ROW_INCHES * (len(predictions) + 1)
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    figure.text(0.1 / width, 1 - 0.27 / height, figure_text(title), fontsize=11, va="center")
    for column, image in enumerate(images):
        left = (_NAME_INCHES + (column + 0.05) * _CELL_INCHES) / width
        bottom = 1 - (0.45 + 0.95 * _CELL_INCHES) / height
        axes = figure.add_axes((left, bottom, 0.9 * _CELL_INCHES / width, 0.9 * _CELL_INCHES / height))
        axes.imshow(image, cmap="gray" if image.mode == "L" else None, interpolation="nearest")
        axes.set_axis_off()
    table = figure.add_axes((0, 0, 1, _ROW_INCHES * (len(predictions) + 1) / height))
    _draw_table(table, labels, predictions, width)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    return figure


def _draw_table(
    axes: Axes, labels: Sequence[str], predictions: Mapping[str, Sequence[ClassScore]], width: float
) -> None:
    # x in inches and y in rows, so that each cell is below its image.
    axes.set_xlim(0, width)
    axes.set_ylim(len(predictions) + 1, 0)
    axes.set_axis_off()
    axes.text(0.1, 0.5, "true label", fontsize=9, va="center", style="italic")
    for column, label in enumerate(labels):
        _write_cell(axes, column, 0, _shorten(label), weight="bold")
    for row, (name, answers) in enumerate(predictions.items(), start=1):
        axes.axhline(row, color="#dddddd", linewidth=0.7)
        axes.text(0.1, row + 0.5, figure_text(name), fontsize=9, va="center")
        for column, (label, answer) in enumerate(zip(labels, answers, strict=True)):
            text = f"{_shorten(answer.name)}\n{100 * answer.probability:.0f} %"
            if answer.name == label:
                _write_cell(axes, column, row, text)
            else:
                _frame_cell(axes, column, row)
                _write_cell(
                    axes, column, row, f"\N{MULTIPLICATION SIGN} {text}", weight="bold", color="#922b21"
                )


def _write_cell(
    axes: Axes, column: int, row: int, text: str, *, weight: str = "normal", color: str = "black"
) -> None:
    x = _NAME_INCHES + (column + 0.5) * _CELL_INCHES
    shown = figure_text(text)
    axes.text(x, row + 0.5, shown, fontsize=7.5, ha="center", va="center", weight=weight, color=color)


def _frame_cell(axes: Axes, column: int, row: int) -> None:
    left = _NAME_INCHES + (column + 0.04) * _CELL_INCHES
    axes.add_patch(
        Rectangle(
            (left, row + 0.06),
            0.92 * _CELL_INCHES,
            0.88,
            facecolor="#f5e4e1",
            edgecolor="#922b21",
            linewidth=1.0,
            zorder=0,
        )
    )


def _shorten(label: str) -> str:
    return label if len(label) <= _LABEL_LETTERS else f"{label[: _LABEL_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
