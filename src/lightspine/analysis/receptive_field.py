"""Effective receptive field: the contribution of each pixel to the center of a feature map."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.analysis.figure_grid import COLORMAP, new_figure
from lightspine.analysis.image_input import ImageLike, read_image
from lightspine.analysis.model_handle import ModelHandle
from lightspine.analysis.stages import Stage, as_map, get_stage, list_stages, record_outputs
from lightspine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DECADES = 4
_HALF = 0.5
_LINES = {"untrained": ("0.55", "--"), "trained": ("black", "-")}

MIN_MAP = 3
"""Smallest side of a map with a central position: one of a 2 x 2 map covers a quarter of the image."""

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Shares of the contribution for which the side of the square is reported, as in the literature."""


@dataclass(frozen=True)
class ReceptiveField:
    """Contribution of each pixel to the center of a feature map, averaged over images.

    Attributes:
        state: "trained" or "untrained".
        contribution: (H, W), float64, not negative; sums to 1.
        center: (y, x) in pixels, the center of the area that the map's central position covers.
        sides: sides of centered squares in pixels, 1, 2, ...
        shares: share of the contribution inside each square, from 0 to 1.
    """

    state: str
    contribution: np.ndarray
    center: tuple[float, float]
    sides: np.ndarray
    shares: np.ndarray

    def side_of(self, share: float) -> int:
        """Return the side in pixels of the smallest centered square with a share of the contribution."""
        return int(self.sides[np.argmax(self.shares >= share - 1e-12)])


@dataclass(frozen=True)
class ErfResult:
    """Receptive fields of one model, untrained and, if there is a checkpoint, trained.

    Attributes:
        model: name of the model.
        module: name of the stage's module.
        images: number of images that were averaged.
        fields: the receptive fields, untrained first.
    """

    model: str
    module: str
    images: int
    fields: list[ReceptiveField]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: STATE_contribution, STATE_centre, STATE_sides and STATE_shares."""
        found: dict[str, np.ndarray] = {}
        for field in self.fields:
            found[f"{field.state}_contribution"] = field.contribution
            found[f"{field.state}_centre"] = np.asarray(field.center)
            found[f"{field.state}_sides"] = field.sides
            found[f"{field.state}_shares"] = field.shares
        return found

    def figure(self) -> "Figure":
        """Draw the heat map of each field, and their contribution curves."""
        return _draw_erf(self)


def erf(
    handle: ModelHandle,
    images: Iterable[ImageLike],
    *,
    stage: int | None = None,
    compare_untrained: bool = True,
) -> ErfResult:
    """Compute the effective receptive field (Luo et al., NeurIPS 2016) of the center of a stage's map.

    The contribution of a pixel is the positive part of the gradient of the positive features at the central
    position (summed over channels) with respect to the pixel, summed over the image's channels and averaged
    over images, as in Ding et al. (CVPR 2022) and VMamba (figure on receptive fields).

    Args:
        handle: see `lightspine.analysis.open_model`.
        images: files or open images of one size after preprocessing; about 10 give a smooth map, papers use
            50.
        stage: index of a stage in the model's `feature_info`; the last one by default. Its map needs 3 x 3
            positions or more.
        compare_untrained: also compute the field of the untrained architecture, if the model is trained.

    Raises:
        UsageError: there is no image, the images have different sizes, the stage does not exist, its map is
            too small, or no pixel contributes to it.
        LightspineError: an image cannot be read.
    """
    stages = list_stages(handle.network)
    chosen = stages[-1] if stage is None else get_stage(stages, stage)
    inputs = [read_image(handle, image).pixels for image in images]
    if len({tuple(pixels.shape) for pixels in inputs}) != 1:
        sizes = sorted({f"{pixels.shape[2]}x{pixels.shape[3]}" for pixels in inputs})
        raise UsageError(f"expected images of one size to average over, got {', '.join(sizes) or 'no image'}")
    handles = [handle]
    if handle.trained and compare_untrained and handle.metadata is not None:
        handles.insert(0, handle.untrained())
    fields = [compute_field(each.network, chosen, inputs, state=each.state) for each in handles]
    return ErfResult(handle.name, chosen.module, len(inputs), fields)


def compute_field(
    network: nn.Module, stage: Stage, inputs: Sequence[Tensor], *, state: str = "trained"
) -> ReceptiveField:
    """Compute the receptive field of one stage of a network; see `erf`.

    Args:
        network: a network in evaluation mode.
        stage: the stage.
        inputs: images (1, C, H, W) of one size.
        state: `state` of the result.

    Raises:
        UsageError: the map is too small, or no pixel contributes.
    """
    size = int(inputs[0].shape[2]), int(inputs[0].shape[3])
    total = np.zeros(size)
    for pixels in inputs:
        pixels = pixels.detach().clone().requires_grad_()
        with torch.enable_grad(), record_outputs(network, [stage.module]) as outputs:
            network(pixels)
            features = as_map(network, outputs[stage.module], stage.channels, size)
            _check_map(stage, features, size)
            cell = features.shape[2] // 2, features.shape[3] // 2
            center = features[:, :, cell[0], cell[1]].relu().sum()
            (gradient,) = torch.autograd.grad(center, pixels)
        total += gradient.relu().sum((0, 1)).double().cpu().numpy()
    if total.sum() == 0:
        raise UsageError(
            f"no pixel contributes to the center of {stage.module}: its features are all negative"
        )
    contribution = total / total.sum()
    middle = (
        (cell[0] + 0.5) * size[0] / features.shape[2],
        (cell[1] + 0.5) * size[1] / features.shape[3],
    )
    sides, shares = contribution_curve(contribution, middle)
    return ReceptiveField(state, contribution, middle, sides, shares)


def _check_map(stage: Stage, features: Tensor, size: tuple[int, int]) -> None:
    height, width = features.shape[2:]
    if min(height, width) < MIN_MAP:
        raise UsageError(
            f"expected a map of at least {MIN_MAP} x {MIN_MAP} positions, got {height} x {width} of "
            f"{stage.module} for images of {size[0]} x {size[1]} px: use larger images or an earlier stage"
        )


def contribution_curve(
    contribution: np.ndarray, center: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the share of the contribution inside centered squares of all sizes.

    Args:
        contribution: (H, W), not negative.
        center: (y, x) in pixels; the center of the first pixel is (0.5, 0.5).

    Returns:
        Sides in pixels, from 1 to the side that covers all, and shares from 0 to 1. A pixel counts if the
        square contains all of it.
    """
    height, width = contribution.shape
    away = np.maximum(
        np.abs(np.arange(height) + 0.5 - center[0])[:, None], np.abs(np.arange(width) + 0.5 - center[1])[None]
    )
    # The smallest side whose square contains the whole pixel.
    reached = np.ceil(2 * away + 1 - 1e-9).astype(int)
    sums = np.bincount(reached.ravel(), weights=contribution.ravel())
    return np.arange(1, len(sums)), np.cumsum(sums)[1:] / contribution.sum()


def _draw_erf(result: ErfResult) -> "Figure":
    """Draw one heat map per field, with the square of half the contribution, and the contribution curves."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    count = len(result.fields)
    figure = new_figure(2.65 * count + 4.3, 3.15)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, count + 1, width_ratios=[1.0] * count + [1.25], squeeze=False)[0]
    # The peaks of networks differ by orders of magnitude, so each map is relative to its own.
    for axis, field in zip(axes, result.fields, strict=False):
        relative = field.contribution / field.contribution.max()
        image = axis.imshow(
            np.maximum(relative, 10.0**-_DECADES),
            cmap=COLORMAP,
            norm=LogNorm(10.0**-_DECADES, 1),
            extent=(0, relative.shape[1], relative.shape[0], 0),
            interpolation="nearest",
        )
        side, (y, x) = field.side_of(_HALF), field.center
        height, width = relative.shape
        # The center of a map with an even side is half a position off that of the image.
        left, right = max(x - side / 2, 0.0), min(x + side / 2, float(width))
        top, bottom = max(y - side / 2, 0.0), min(y + side / 2, float(height))
        axis.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=1.1)
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
        color, style = _LINES[field.state]
        curves.plot(field.sides, 100 * field.shares, style, color=color, label=field.state, linewidth=1.6)
    curves.set_xlim(0, max(int(field.sides[-1]) for field in result.fields))
    curves.set_ylim(0, 100)
    curves.set_xlabel("side of the centered square, px", fontsize=8)
    curves.set_ylabel("contribution inside, %", fontsize=8)
    curves.tick_params(labelsize=7)
    curves.grid(color="0.88", linewidth=0.6)
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(fontsize=8, frameon=False, loc="lower right")
    images = "1 image" if result.images == 1 else f"{result.images} images"
    figure.suptitle(
        f"{result.model}, effective receptive field of the center of {result.module}, {images}",
        fontsize=10.5,
        x=0.01,
        ha="left",
    )
    return figure
