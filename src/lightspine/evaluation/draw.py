"""Draw what a detector or segmenter found into a PNG that can be read in colour and in grey."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Stroke, withStroke
from numpy.typing import ArrayLike
from PIL import Image
from scipy import ndimage

from lightspine.errors import UsageError
from lightspine.utils.files import atomic_write

_DPI = 100
_LEGEND_INCHES = 2.6
_ROW_INCHES = 0.2
_LETTERS = 26
# Classes that are neighbours in the list differ in brightness too, so that grey prints tell them apart.
_BRIGHTNESS = (1.0, 0.55, 0.8)
_SATURATION = (0.8, 0.5)
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_HATCHES = ("", "///", "...", "xxx", "---", "\\\\\\", "ooo", "|||")
_MIN_SIDE = 640


def draw_detections(
    image: Image.Image,
    detections: Mapping[str, ArrayLike],
    class_names: Sequence[str],
    path: str | Path,
    *,
    least_score: float = 0.5,
) -> int:
    """Draw boxes with class and score and, where there are masks, their outlines and tint, as PNG.

    Args:
        image: 8-bit RGB.
        detections: `boxes` (N, 4), left, top, right, bottom in pixels of the image; `labels` (N,), class + 1;
            `scores` (N,), or none for the true objects; `masks` (N, H, W) or (N, 1, H, W), 0..1, if wanted.
        class_names: in the order of the classes.
        path: the PNG file.
        least_score: of what is drawn.

    Returns:
        How many detections were drawn.

    Raises:
        UsageError: masks of another size than the image.
        LightspineError: the file cannot be written.
    """
    boxes = np.asarray(detections["boxes"], dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(detections["labels"], dtype=np.int64) - 1
    scores = None if "scores" not in detections else np.asarray(detections["scores"], dtype=np.float64)
    drawn = np.arange(len(boxes)) if scores is None else np.flatnonzero(scores >= least_score)
    # The largest first: a small object inside a large one stays to be seen.
    drawn = drawn[np.argsort(-np.prod(boxes[drawn, 2:] - boxes[drawn, :2], axis=1), kind="stable")]
    figure, axes, scale = _canvas(image, legend=False)
    if "masks" in detections and len(drawn):
        _draw_masks(axes, image, _squeeze_masks(detections["masks"])[drawn], labels[drawn], scale)
    crowded = len(drawn) > 30
    for number in drawn:
        _draw_box(axes, boxes[number], _colour(labels[number]), scale)
        # Hundreds of tags would hide what they name; one class needs none.
        if not (crowded and len(class_names) == 1):
            text = class_names[labels[number]] + ("" if scores is None else f" {scores[number]:.2f}")
            _draw_tag(axes, boxes[number], text, small=crowded)
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
    """Draw a class map over its image with a legend of the classes that are in it, as PNG.

    Classes differ in colour and hatching, borders are lines, and large regions carry the number that the
    legend gives: each can be told from the others without colour too.

    Args:
        image: 8-bit RGB.
        classes: (H, W), class of each pixel.
        class_names: in the order of the classes.
        path: the PNG file.
        ignored: value of pixels without a class, which are left as they are.
        opacity: of the colours, from 0 to 1.

    Raises:
        UsageError: classes of another size than the image, or without a name; an opacity outside 0 to 1.
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
    figure, axes, scale = _canvas(image, legend=True, rows=len(order) + 1)
    handles = [_draw_class(axes, found == number, number, opacity, scale) for number in order]
    axes.contour(_borders(found), levels=[0.5], colors="white", linewidths=1.4)
    axes.contour(_borders(found), levels=[0.5], colors="black", linewidths=0.6)
    for number in order:
        _number_region(axes, found == number, number, scale)
    share = {number: count / found.size for number, count in zip(numbers.tolist(), counts, strict=True)}
    texts = [f"{number} {_shorten(class_names[number])}  {share[number]:.0%}" for number in order]
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


def _canvas(image: Image.Image, *, legend: bool, rows: int = 0) -> tuple[Figure, Axes, float]:
    """Return a figure that shows the image, enlarged if it is small, and how many times enlarged."""
    scale = max(1.0, _MIN_SIDE / max(image.size))
    width, height = (side * scale / _DPI for side in image.size)
    full = (width + _LEGEND_INCHES * legend, max(height, rows * _ROW_INCHES + 0.2))
    figure = Figure(figsize=full, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 1 - height / full[1], width / full[0], height / full[1]))
    axes.imshow(image, interpolation="bilinear")
    axes.set_axis_off()
    # What is drawn over the border must not change what is shown.
    axes.set_autoscale_on(False)
    return figure, axes, scale


def _draw_masks(axes: Axes, image: Image.Image, masks: np.ndarray, labels: np.ndarray, scale: float) -> None:
    size = (image.height, image.width)
    if masks.shape[1:] != size:
        raise UsageError(f"expected masks of the image's size {size}, got {masks.shape[1:]}")
    layer = np.zeros((*size, 4))
    for mask, label in zip(masks >= 0.5, labels, strict=True):
        layer[mask] = (*_colour(label), 0.35)
    axes.imshow(layer, interpolation="nearest")
    for mask in masks >= 0.5:
        # A ring of zeros closes the outline of a mask that touches the border.
        outline = np.pad(mask.astype(np.float32), 1)
        if mask.any():
            x, y = np.arange(-1, size[1] + 1), np.arange(-1, size[0] + 1)
            axes.contour(x, y, outline, levels=[0.5], colors="black", linewidths=2.0)
            axes.contour(x, y, outline, levels=[0.5], colors="white", linewidths=0.8 if scale > 1 else 1.0)


def _draw_box(axes: Axes, box: np.ndarray, colour: tuple[float, ...], scale: float) -> None:
    left, top, right, bottom = box
    # A coloured line between a dark and a light one is seen on any ground.
    effects = [Stroke(linewidth=3.6, foreground="black"), withStroke(linewidth=2.4, foreground="white")]
    width = 1.2 if scale > 1 else 1.6
    axes.add_patch(
        Rectangle(
            (left - 0.5, top - 0.5),
            right - left,
            bottom - top,
            fill=False,
            edgecolor=colour,
            linewidth=width,
            path_effects=effects,
        )
    )


def _draw_tag(axes: Axes, box: np.ndarray, text: str, *, small: bool) -> None:
    left, top = max(box[0], 0), max(box[1], 0)
    axes.text(
        left,
        top,
        text,
        fontsize=5 if small else 8,
        color="black",
        va="top",
        ha="left",
        bbox={"facecolor": "white", "edgecolor": "black", "linewidth": 0.5, "pad": 1.2},
        clip_on=True,
    )


def _draw_class(axes: Axes, mask: np.ndarray, number: int, opacity: float, scale: float) -> Patch:
    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*_colour(number), opacity)
    axes.imshow(layer, interpolation="nearest")
    hatch = _hatch(number)
    if hatch:
        # Filled contours carry hatching; their own colour is left out.
        with_ring = np.pad(mask.astype(np.float32), 1)
        x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
        filled: Any = axes.contourf(x, y, with_ring, levels=[0.5, 2], colors="none", hatches=[hatch])
        filled.set_edgecolor((0, 0, 0, 0.55))
        filled.set_linewidth(0 * scale)
    red, green, blue = _colour(number)
    return Patch(facecolor=(red, green, blue, opacity), edgecolor="black", hatch=hatch, linewidth=0.8)


def _number_region(axes: Axes, mask: np.ndarray, number: int, scale: float) -> None:
    """Write the class's number into its largest region, where it is farthest from a border."""
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
    """Return 1 where a pixel's right or lower neighbour has another class."""
    border = np.zeros(classes.shape, dtype=np.float32)
    border[:, :-1] = classes[:, 1:] != classes[:, :-1]
    border[:-1] = np.maximum(border[:-1], classes[1:] != classes[:-1])
    return border


def _squeeze_masks(masks: ArrayLike) -> np.ndarray:
    found = np.asarray(masks)
    return found[:, 0] if found.ndim == 4 else found


def _colour(number: int) -> tuple[float, ...]:
    """Return red, green and blue of a class: steps of the golden ratio keep the hues of any number apart."""
    number = int(number)
    brightness = _BRIGHTNESS[number % len(_BRIGHTNESS)]
    saturation = _SATURATION[number // len(_BRIGHTNESS) % len(_SATURATION)]
    return tuple(hsv_to_rgb((number * _GOLDEN_RATIO % 1, saturation, brightness)).tolist())


def _hatch(number: int) -> str:
    return _HATCHES[int(number) % len(_HATCHES)]


def _shorten(name: str) -> str:
    return name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…"


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_write(Path(path)) as file:
        figure.savefig(file, format="png")
