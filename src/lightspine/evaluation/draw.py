"""Draw detections, segmentation maps and confusion matrices as PNG, readable in color and in grayscale.

With matplotlib, because torchvision's drawing functions have no outlines, hatching or legend, without which
classes look alike in grayscale.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Stroke, withStroke
from numpy.typing import ArrayLike
from PIL import Image
from scipy import ndimage
from sklearn.metrics import ConfusionMatrixDisplay

from lightspine.errors import UsageError
from lightspine.utils.files import atomic_write
from lightspine.utils.printable import figure_text

_DPI = 100
_LEGEND_INCHES = 2.6
_ROW_INCHES = 0.2
_MAX_NAME_LENGTH = 26
# Consecutive classes differ in brightness too, to be distinguishable in grayscale.
_BRIGHTNESS = (1.0, 0.55, 0.8)
_SATURATION = (0.8, 0.5)
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_LABEL_BOX = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.5, "pad": 1.2}
_HATCHES = ("", "///", "...", "xxx", "---", "\\\\\\", "ooo", "|||")
_MIN_SIDE = 640
# Up to these numbers of classes a confusion matrix shows values and names.
_MAX_VALUES, _MAX_NAMES = 25, 50

_Extent = tuple[float, float, float, float]
"""Left, top, right, bottom in image pixels."""


def draw_detections(
    image: Image.Image,
    detections: Mapping[str, ArrayLike],
    class_names: Sequence[str],
    path: str | Path,
    *,
    min_score: float = 0.5,
    max_drawn: int | None = None,
) -> int:
    """Draw detections: boxes with class and score and, if given, masks with outlines.

    Labels are placed so that they do not cover each other, as far as there is room.

    Args:
        image: 8-bit RGB.
        detections: `boxes` (N, 4), left, top, right, bottom in image pixels; `labels` (N,), class + 1;
            optionally `scores` (N,), absent for ground truth, and `masks` (N, H, W) or (N, 1, H, W), 0..1.
        class_names: one name per class.
        path: PNG file to write.
        min_score: minimum score of the drawn detections.
        max_drawn: maximum number of drawn detections, those of the highest scores (of the largest boxes
            without scores); a note in the picture then gives their share. `None`: all.

    Returns:
        Number of drawn detections.

    Raises:
        UsageError: masks of another size than the image, or max_drawn below 1.
        LightspineError: the file cannot be written.
    """
    boxes = np.asarray(detections["boxes"], dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(detections["labels"], dtype=np.int64) - 1
    scores = None if "scores" not in detections else np.asarray(detections["scores"], dtype=np.float64)
    drawn = np.arange(len(boxes)) if scores is None else np.flatnonzero(scores >= min_score)
    if max_drawn is not None and max_drawn < 1:
        raise UsageError(f"expected max_drawn of at least 1, got {max_drawn}")
    # Largest first, so that small objects inside large ones stay visible.
    found, areas = len(drawn), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    importance = areas if scores is None else scores
    drawn = drawn[np.argsort(-importance[drawn], kind="stable")][:max_drawn]
    drawn = drawn[np.argsort(-areas[drawn], kind="stable")]
    figure, axes, scale = _canvas(image, legend=False)
    if "masks" in detections and len(drawn):
        _draw_masks(axes, image, _squeeze_masks(detections["masks"])[drawn], labels[drawn], scale)
    crowded = len(drawn) > 30
    for number in drawn:
        _draw_box(axes, boxes[number], _class_color(labels[number]), scale)
    # Hundreds of labels would cover the objects; a single class needs none.
    if not (crowded and len(class_names) == 1):
        placed: list[_Extent] = []
        for number in drawn[np.argsort(-importance[drawn], kind="stable")]:
            text = class_names[labels[number]] + ("" if scores is None else f" {scores[number]:.2f}")
            _draw_label(axes, boxes[number], text, scale, image.size, placed, small=crowded)
    if len(drawn) < found:
        note = f"{len(drawn)} of {found} drawn"
        axes.text(
            0.99, 0.01, note, transform=axes.transAxes, fontsize=8, ha="right", va="bottom", bbox=_LABEL_BOX
        )
    _save(figure, path)
    return len(drawn)


def draw_classes(
    image: Image.Image,
    classes: ArrayLike,
    class_names: Sequence[str],
    path: str | Path,
    *,
    ignored: int = 255,
    opacity: float = 0.6,
) -> None:
    """Draw a segmentation map over its image, with a legend.

    Classes differ in color and hatching, borders are drawn as lines, and large regions show the class index,
    so that the picture is readable without color.

    Args:
        image: 8-bit RGB.
        classes: (H, W), class of each pixel.
        class_names: one name per class.
        path: PNG file to write.
        ignored: value of pixels without a class, which are not drawn.
        opacity: opacity of the colors, from 0 to 1.

    Raises:
        UsageError: a segmentation map of another size than the image, a class without a name, or an opacity
            outside 0 to 1.
        LightspineError: the file cannot be written.
    """
    found = np.asarray(classes)
    if found.shape != (image.height, image.width):
        raise UsageError(
            f"expected classes of the image's size {(image.height, image.width)}, got {found.shape}"
        )
    if not 0 <= opacity <= 1:
        raise UsageError(f"expected an opacity from 0 to 1, got {opacity}")
    numbers, counts = np.unique(found[found != ignored], return_counts=True)
    if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < len(class_names):
        raise UsageError(f"expected classes from 0 to {len(class_names) - 1}, got {numbers[-1]}")
    order = numbers[np.argsort(-counts, kind="stable")].tolist()
    figure, axes, scale = _canvas(image, legend=True, rows=len(order) + 2)
    handles = [_fill_class(axes, found == number, number, opacity) for number in order]
    axes.contour(_borders(found), levels=[0.5], colors="white", linewidths=1.4)
    axes.contour(_borders(found), levels=[0.5], colors="black", linewidths=0.6)
    for number in order:
        _label_region(axes, found == number, number, scale)
    share = {number: count / found.size for number, count in zip(numbers.tolist(), counts, strict=True)}
    texts = [f"{_legend_name(number, class_names)}  {share[number]:.0%}" for number in order]
    if (found == ignored).any():
        handles.append(Patch(facecolor="none", edgecolor="gray", linewidth=0.8))
        texts.append(f"ignored  {(found == ignored).mean():.0%}")
    figure.legend(
        handles,
        texts,
        loc="upper right",
        fontsize=8,
        frameon=False,
        handlelength=2.6,
        handleheight=1.3,
        labelspacing=0.35,
        borderaxespad=0.6,
    )
    _save(figure, path)


def draw_image_grid(images: Sequence[Image.Image], titles: Sequence[str], path: str | Path) -> None:
    """Draw images in rows of up to six, each with a title.

    Args:
        images: 8-bit RGB images of any size, at least one.
        titles: one title per image.
        path: PNG file to write.

    Raises:
        LightspineError: the file cannot be written.
    """
    columns = min(len(images), 6)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.0 * columns, 2.3 * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image)
        axes.set_title(figure_text(_truncate(title, 24)), fontsize=9)
    _save(figure, path)


def draw_confusion_matrix(
    confusion: ArrayLike, names: Sequence[str], path: str | Path, *, title: str, unit: str = "images"
) -> None:
    """Draw a confusion matrix in grayscale, normalized to percent of each true class.

    Values are written for up to 25 classes and names for up to 50; more classes are labeled by their index.

    Args:
        confusion: (classes, classes) counts; rows are true classes, columns predicted ones.
        names: one name per class.
        path: PNG file to write.
        title: title of the picture.
        unit: unit of the counts.

    Raises:
        UsageError: a matrix that is not square, or another number of names.
        LightspineError: the file cannot be written.
    """
    count, counts = len(names), np.asarray(confusion)
    if not count or counts.shape != (count, count):
        raise UsageError(
            f"expected a square matrix with one name per row, got {'x'.join(map(str, counts.shape))} and "
            f"{count} names"
        )
    totals = counts.sum(axis=1)
    percent = 100 * counts / np.maximum(totals, 1)[:, None]
    side = max(4.2, (0.5 if count <= _MAX_VALUES else 0.3) * count) if count <= _MAX_NAMES else 10.0
    figure = Figure(figsize=(side + 2.6, side + 2.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # A root scale makes rare confusions visible next to nearly perfect classes.
    norm = PowerNorm(0.5 if count <= _MAX_NAMES else 0.3, vmin=0, vmax=100)
    display = ConfusionMatrixDisplay(percent).plot(
        ax=axes,
        cmap="Greys",
        include_values=count <= _MAX_VALUES,
        values_format=".0f",
        im_kw={"norm": norm, "interpolation": "nearest" if count <= _MAX_NAMES else "auto"},
        text_kw={"fontsize": 8},
        colorbar=False,
    )
    for row, column in np.ndindex(counts.shape) if display.text_ is not None else ():
        text, value = display.text_[row, column], percent[row, column]
        text.set_color("white" if value > 25 else "black")
        if value < 0.5:
            text.set_text("<1" if counts[row, column] else "")
    if count <= _MAX_NAMES:
        short = [_truncate(name, 22) for name in names]
        shown = list(map(figure_text, short))
        axes.set_xticks(range(count), shown, rotation=90 if max(map(len, short)) > 2 else 0)
        axes.set_yticks(
            range(count), [f"{name} ({total})" for name, total in zip(shown, totals, strict=True)]
        )
        axes.tick_params(labelsize=8 if count <= _MAX_VALUES else 6.5, length=0)
        # The grid is gray, because white lines would be invisible next to empty cells.
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="0.8", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
        axes.set(xlabel="predicted", ylabel=f"true ({unit})")
    else:
        step = next(step for step in (10, 20, 50, 100, 200, 500, 1000) if count <= 12 * step or step == 1000)
        axes.set_xticks(range(0, count, step))
        axes.set_yticks(range(0, count, step))
        axes.set_xticklabels(map(str, range(0, count, step)), rotation=0)
        axes.set_yticklabels(map(str, range(0, count, step)))
        axes.set(xlabel="predicted class index", ylabel="true class index")
    axes.set_title(figure_text(title), loc="left", fontsize=11)
    ticks = [0, 1, 5, 10, 20, 40, 60, 80, 100]
    bar = figure.colorbar(display.im_, ax=axes, fraction=0.046, pad=0.02, ticks=ticks)
    bar.set_label(f"% of the {unit} of a true class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _save(figure, path, tight=True)


def _canvas(image: Image.Image, *, legend: bool, rows: int = 0) -> tuple[Figure, Axes, float]:
    """Create a figure of the image, enlarged if it is small; returns figure, axes and enlargement factor."""
    scale = max(1.0, _MIN_SIDE / max(image.size))
    width, height = (side * scale / _DPI for side in image.size)
    full = (width + _LEGEND_INCHES * legend, max(height, rows * _ROW_INCHES + 0.2))
    figure = Figure(figsize=full, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 1 - height / full[1], width / full[0], height / full[1]))
    axes.imshow(image, interpolation="bilinear")
    axes.set_axis_off()
    # Drawing over the border must not change the view.
    axes.set_autoscale_on(False)
    return figure, axes, scale


def _draw_masks(axes: Axes, image: Image.Image, masks: np.ndarray, labels: np.ndarray, scale: float) -> None:
    size = (image.height, image.width)
    if masks.shape[1:] != size:
        raise UsageError(f"expected masks of the image's size {size}, got {masks.shape[1:]}")
    layer = np.zeros((*size, 4))
    for mask, label in zip(masks >= 0.5, labels, strict=True):
        layer[mask] = (*_class_color(label), 0.35)
    axes.imshow(layer, interpolation="nearest")
    for mask in masks >= 0.5:
        # Padding closes the outline of a mask that touches the border.
        outline = np.pad(mask.astype(np.float32), 1)
        if mask.any():
            x, y = np.arange(-1, size[1] + 1), np.arange(-1, size[0] + 1)
            axes.contour(x, y, outline, levels=[0.5], colors="black", linewidths=2.0)
            axes.contour(x, y, outline, levels=[0.5], colors="white", linewidths=0.8 if scale > 1 else 1.0)


def _draw_box(axes: Axes, box: np.ndarray, color: tuple[float, ...], scale: float) -> None:
    left, top, right, bottom = box
    # A dark and a light outline make the colored line visible on any background.
    effects = [Stroke(linewidth=3.6, foreground="black"), withStroke(linewidth=2.4, foreground="white")]
    width = 1.2 if scale > 1 else 1.6
    axes.add_patch(
        Rectangle(
            (left - 0.5, top - 0.5),
            right - left,
            bottom - top,
            fill=False,
            edgecolor=color,
            linewidth=width,
            path_effects=effects,
        )
    )


def _draw_label(
    axes: Axes,
    box: np.ndarray,
    text: str,
    scale: float,
    size: tuple[int, int],
    placed: list[_Extent],
    *,
    small: bool,
) -> None:
    """Write the label of a box where it covers as little as possible of the labels placed so far."""
    label = axes.text(
        *(0, 0, figure_text(text)),
        fontsize=5 if small else 8,
        color="black",
        va="top",
        ha="left",
        bbox=_LABEL_BOX,
    )
    label.set_clip_on(True)
    extent = label.get_window_extent()
    # From pixels of the picture to those of the image, with the border around the text.
    width, height = (extent.width + 6) / scale, (extent.height + 6) / scale
    left, top, right, bottom = box
    best = min(
        (
            (min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0)))
            for y in (top, top - height, bottom - height, bottom, (top + bottom - height) / 2)
            for x in (left, right - width)
        ),
        key=lambda place: _overlap((*place, place[0] + width, place[1] + height), placed),
    )
    placed.append((*best, best[0] + width, best[1] + height))
    label.set_position((best[0] + 2 / scale, best[1] + 2 / scale))


def _overlap(extent: _Extent, others: Sequence[_Extent]) -> float:
    """Return the area that an extent shares with others."""
    return sum(
        max(min(extent[2], other[2]) - max(extent[0], other[0]), 0)
        * max(min(extent[3], other[3]) - max(extent[1], other[1]), 0)
        for other in others
    )


def _legend_name(number: int, class_names: Sequence[str]) -> str:
    """Return the index and the name of a class; a name that is the index is written once."""
    name = _truncate(class_names[number])
    return figure_text(name if name == str(number) else f"{number} {name}")


def _fill_class(axes: Axes, mask: np.ndarray, number: int, opacity: float) -> Patch:
    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*_class_color(number), opacity)
    axes.imshow(layer, interpolation="nearest")
    hatch = _hatch(number)
    if hatch:
        # Only filled contours support hatching; their fill stays transparent.
        with_ring = np.pad(mask.astype(np.float32), 1)
        x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
        filled: Any = axes.contourf(x, y, with_ring, levels=[0.5, 2], colors="none", hatches=[hatch])
        filled.set_edgecolor((0, 0, 0, 0.55))
        filled.set_linewidth(0)
    red, green, blue = _class_color(number)
    return Patch(facecolor=(red, green, blue, opacity), edgecolor="black", hatch=hatch, linewidth=0.8)


def _label_region(axes: Axes, mask: np.ndarray, number: int, scale: float) -> None:
    """Write the class index into the largest region of a class, at the point farthest from its border."""
    regions, count = ndimage.label(mask)
    sizes = np.bincount(regions.ravel())[1:]
    if not count:
        return
    largest = np.pad(regions == int(sizes.argmax()) + 1, 1)
    depth = ndimage.distance_transform_edt(largest)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    if depth[row, column] * scale >= 9:
        axes.text(
            float(column),
            float(row),
            str(number),
            fontsize=9,
            ha="center",
            va="center",
            color="black",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _borders(classes: np.ndarray) -> np.ndarray:
    """Return 1 for pixels whose right or lower neighbor has another class."""
    border = np.zeros(classes.shape, dtype=np.float32)
    border[:, :-1] = classes[:, 1:] != classes[:, :-1]
    border[:-1] = np.maximum(border[:-1], classes[1:] != classes[:-1])
    return border


def _squeeze_masks(masks: ArrayLike) -> np.ndarray:
    found = np.asarray(masks)
    return found[:, 0] if found.ndim == 4 else found


def _class_color(number: int) -> tuple[float, ...]:
    """Return the RGB color of a class; golden ratio steps spread the hues of any number of classes."""
    number = int(number)
    brightness = _BRIGHTNESS[number % len(_BRIGHTNESS)]
    saturation = _SATURATION[number // len(_BRIGHTNESS) % len(_SATURATION)]
    return tuple(hsv_to_rgb((number * _GOLDEN_RATIO % 1, saturation, brightness)).tolist())


def _hatch(number: int) -> str:
    return _HATCHES[int(number) % len(_HATCHES)]


def _truncate(name: str, length: int = _MAX_NAME_LENGTH) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _save(figure: Figure, path: str | Path, *, tight: bool = False) -> None:
    with atomic_write(Path(path)) as file:
        # The layout of axes with a fixed aspect ratio may leave a label outside of the figure.
        figure.savefig(file, format="png", bbox_inches="tight" if tight else None)
