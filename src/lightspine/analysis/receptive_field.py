"""The effective receptive field: which pixels the centre of a map depends on, and how much."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.analysis.pictures import ImageLike, read_picture
from lightspine.analysis.stages import Stage, as_map, list_stages, pick_stage, recorded_outputs
from lightspine.analysis.subject import Subject
from lightspine.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.2, 0.3, 0.5, 0.99)
"""The shares of the contribution whose squares are told, as in the literature."""


@dataclass(frozen=True)
class ReceptiveField:
    """How much every pixel contributes to the centre of a map, averaged over images.

    Attributes:
        state: "trained" or "untrained".
        contribution: (H, W) float64, at least 0; the sum over all pixels is 1.
        centre: (y, x) in pixels, the middle of what the map's central position covers.
        sides: of the centred squares, in pixels, from 1 up.
        shares: of the contribution that lies in each square, from 0 to 1.
    """

    state: str
    contribution: np.ndarray
    centre: tuple[float, float]
    sides: np.ndarray
    shares: np.ndarray

    def side_of(self, share: float) -> int:
        """Return the side in pixels of the smallest centred square that holds a share of the contribution."""
        return int(self.sides[np.argmax(self.shares >= share - 1e-12)])


@dataclass(frozen=True)
class ErfResult:
    """The receptive fields of one network, before training and, with a checkpoint, after it.

    Attributes:
        subject: name of the network.
        module: the stage's module.
        images: how many images were averaged.
        fields: untrained first.
    """

    subject: str
    module: str
    images: int
    fields: list[ReceptiveField]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the numbers by name: contribution, sides and shares of every field."""
        found: dict[str, np.ndarray] = {}
        for field in self.fields:
            found[f"{field.state}_contribution"] = field.contribution
            found[f"{field.state}_centre"] = np.asarray(field.centre)
            found[f"{field.state}_sides"] = field.sides
            found[f"{field.state}_shares"] = field.shares
        return found

    def figure(self) -> "Figure":
        """Draw a heat map of every field, and their contribution curves."""
        from lightspine.analysis.erf_figure import draw_erf

        return draw_erf(self)


def erf(
    subject: Subject,
    images: Iterable[ImageLike],
    *,
    stage: int | None = None,
    compare_untrained: bool = True,
) -> ErfResult:
    """Measure the effective receptive field (Luo et al., NeurIPS 2016) of the centre of a stage's map.

    It is the gradient of the positive features at the central position, summed over channels, with respect to
    the pixels; of it the positive part, summed over the image's channels and averaged over images, as Ding et
    al. (CVPR 2022) and VMamba (figure on receptive fields) draw it.

    Args:
        subject: see `lightspine.analysis.open_subject`.
        images: files or open images, all seen at the same size; some 10 give a smooth map, papers take 50.
        stage: number in the model's `feature_info`; the last by default.
        compare_untrained: also measure the architecture with initial weights, where there are trained ones.

    Raises:
        UsageError: no image, images of different sizes, no such stage, or a stage that no pixel contributes
            to.
        LightspineError: an image cannot be read.
    """
    stages = list_stages(subject.network)
    chosen = stages[-1] if stage is None else pick_stage(stages, stage)
    inputs = [read_picture(subject, image).pixels for image in images]
    if len({tuple(pixels.shape) for pixels in inputs}) != 1:
        sizes = sorted({f"{pixels.shape[2]}x{pixels.shape[3]}" for pixels in inputs})
        raise UsageError(f"expected images of one size to average over, got {', '.join(sizes) or 'no image'}")
    subjects = [subject]
    if subject.trained and compare_untrained and subject.saved is not None:
        subjects.insert(0, subject.untrained())
    fields = [measure_field(each.network, chosen, inputs, state=each.state) for each in subjects]
    return ErfResult(subject.name, chosen.module, len(inputs), fields)


def measure_field(
    network: nn.Module, stage: Stage, inputs: Sequence[Tensor], *, state: str = "trained"
) -> ReceptiveField:
    """Measure the field of one stage of a module; see `erf`.

    Args:
        network: in evaluation mode.
        stage: whose map.
        inputs: images (1, C, H, W) of one size.
        state: what the result is called.

    Raises:
        UsageError: no pixel contributes.
    """
    size = int(inputs[0].shape[2]), int(inputs[0].shape[3])
    total = np.zeros(size)
    for pixels in inputs:
        pixels = pixels.detach().clone().requires_grad_()
        with torch.enable_grad(), recorded_outputs(network, [stage]) as outputs:
            network(pixels)
            features = as_map(network, outputs[stage.index], stage.channels, size)
            cell = features.shape[2] // 2, features.shape[3] // 2
            centre = features[:, :, cell[0], cell[1]].relu().sum()
            (gradient,) = torch.autograd.grad(centre, pixels)
        total += gradient.relu().sum((0, 1)).double().cpu().numpy()
    if total.sum() == 0:
        raise UsageError(
            f"no pixel contributes to the centre of {stage.module}: its features are all negative"
        )
    contribution = total / total.sum()
    middle = (
        (cell[0] + 0.5) * size[0] / features.shape[2],
        (cell[1] + 0.5) * size[1] / features.shape[3],
    )
    sides, shares = contribution_curve(contribution, middle)
    return ReceptiveField(state, contribution, middle, sides, shares)


def contribution_curve(
    contribution: np.ndarray, centre: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sides of growing centred squares and the share of the contribution that lies in each.

    Args:
        contribution: (H, W), at least 0.
        centre: (y, x) in pixels; the middle of the first pixel is (0.5, 0.5).

    Returns:
        Sides in pixels, 1 to the one that covers all, and shares from 0 to 1; a pixel counts when it lies
        whole in the square.
    """
    height, width = contribution.shape
    away = np.maximum(
        np.abs(np.arange(height) + 0.5 - centre[0])[:, None], np.abs(np.arange(width) + 0.5 - centre[1])[None]
    )
    # The least side whose square holds the whole pixel.
    reached = np.ceil(2 * away + 1 - 1e-9).astype(int)
    sums = np.bincount(reached.ravel(), weights=contribution.ravel())
    return np.arange(1, len(sums)), np.cumsum(sums)[1:] / contribution.sum()
