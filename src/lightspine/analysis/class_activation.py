"""Grad-CAM and activation maps of the stages of a model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.analysis.figure_grid import Panel
from lightspine.analysis.image_input import ImageInput, ImageLike, read_image
from lightspine.analysis.model_handle import ModelHandle
from lightspine.analysis.results import ImageResult
from lightspine.analysis.stages import Stage, as_map, record_outputs, select_stages
from lightspine.errors import UsageError


@dataclass(frozen=True)
class CamResult(ImageResult):
    """Grad-CAM and activation map of each stage.

    Attributes:
        class_name: the explained class.
        probability: the model's probability of this class, from 0 to 1.
        modules: names of the stages' modules.
        cams: Grad-CAM of each stage, (h, w), not negative.
        activations: Euclidean norm over the channels of each stage's map, (h, w).
    """

    class_name: str
    probability: float
    modules: list[str]
    cams: list[np.ndarray]
    activations: list[np.ndarray]

    def rows(self) -> list[list[Panel]]:
        """Return one row of Grad-CAMs and one of activation maps."""
        return [
            [
                Panel(f"Grad-CAM, {m}", v, over=self.image)
                for m, v in zip(self.modules, self.cams, strict=True)
            ],
            [
                Panel(f"activation, {m}", v, size=self.image.size)
                for m, v in zip(self.modules, self.activations, strict=True)
            ],
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: image, cam_MODULE and activation_MODULE."""
        found = super().arrays()
        for module, cam_map, activation in zip(self.modules, self.cams, self.activations, strict=True):
            found |= {f"cam_{module}": cam_map, f"activation_{module}": activation}
        return found

    def heading(self) -> str:
        """Return the text above the figure: model, image and class."""
        return f"{self.model}, {self.image.name}: {self.class_name} ({100 * self.probability:.0f} %)"

    def caption(self) -> str:
        """Return the text below the figure, which explains the scales."""
        return "each map on its own scale, from 0 (dark) to its maximum (bright)"


def cam(
    handle: ModelHandle,
    images: Iterable[ImageLike],
    *,
    stage: int | None = None,
    target: str | int | None = None,
) -> list[CamResult]:
    """Compute Grad-CAM (Selvaraju et al., ICCV 2017) and activation maps.

    Grad-CAM is the positive part of the channels of a stage's map, summed with the spatial means of the
    logit's gradient as weights.

    Args:
        handle: see `lightspine.analysis.open_model`.
        images: files or open images.
        stage: index of a stage in the model's `feature_info`; by default all stages, or four of them if there
            are many. By default stages that the class does not depend on are left out, for example the
            patches of Vim's last block, whose head uses the class token only.
        target: name or index of the class; by default the predicted one.

    Raises:
        UsageError: the stage or class does not exist, or the class does not depend on the stage.
        LightspineError: an image cannot be read.
    """
    number = None if target is None else find_class(handle.class_names, target)
    stages = select_stages(handle.network, stage)
    found = []
    for image in images:
        image_input = read_image(handle, image)
        logits, outputs, gradients = _logits_and_gradients(handle.network, stages, image_input.pixels, number)
        explained = int(logits.argmax()) if number is None else number
        pairs = _stage_maps(handle.network, stages, outputs, gradients, image_input)
        used = [(each, *pair) for each, pair in zip(stages, pairs, strict=True) if bool(pair[1].any())]
        if not used:
            raise UsageError(
                f"the class does not depend on the map of {stages[0].module} of {handle.name}: "
                "expected an earlier stage"
            )
        found.append(
            CamResult(
                image_input,
                f"{handle.name}, {handle.state}",
                class_name=handle.class_names[explained],
                probability=float(logits.softmax(0)[explained]),
                modules=[each.module for each, _, _ in used],
                cams=[grad_cam(features, gradient) for _, features, gradient in used],
                activations=[_to_array(features.norm(dim=0)) for _, features, _ in used],
            )
        )
    return found


def grad_cam(features: Tensor, gradient: Tensor) -> np.ndarray:
    """Compute Grad-CAM (h, w) from a map (C, h, w) and the gradient (C, h, w) of a logit."""
    weights = gradient.mean((1, 2))
    return _to_array(torch.einsum("c,chw->hw", weights, features).relu())


def find_class(names: Sequence[str], target: str | int) -> int:
    """Return the index of a class given by name, by a unique prefix of its name, or by index.

    Raises:
        UsageError: no class or more than one class matches.
    """
    if target in names:
        return list(names).index(str(target))
    if str(target).isdigit():
        if int(target) < len(names):
            return int(target)
        raise UsageError(f"expected a class from 0 to {len(names) - 1}, got {target}")
    starting = [i for i, name in enumerate(names) if name.startswith(str(target))]
    if len(starting) == 1:
        return starting[0]
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise UsageError(
        f"{len(starting)} classes begin with {target!r}, expected one of {shown}"
        if starting
        else f"expected a class among {shown}, got {target!r}"
    )


def _logits_and_gradients(
    network: nn.Module, stages: Sequence[Stage], pixels: Tensor, target: int | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute the logits, the stages' outputs and the gradients of one logit with respect to them."""
    # Gradients of the pixels exist even if all weights are frozen.
    pixels = pixels.detach().clone().requires_grad_()
    with torch.enable_grad(), record_outputs(network, [stage.module for stage in stages]) as recorded:
        logits = network(pixels)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] == 0:
            raise UsageError("expected a classifier, got a model whose output is not (B, classes)")
        outputs = [recorded[stage.module] for stage in stages]
        chosen = int(logits[0].argmax()) if target is None else target
        gradients = torch.autograd.grad(logits[0, chosen], outputs, allow_unused=True, materialize_grads=True)
    return logits[0].detach().float(), [output.detach() for output in outputs], list(gradients)


def _stage_maps(
    network: nn.Module,
    stages: Sequence[Stage],
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    image_input: ImageInput,
) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            as_map(network, output, stage.channels, image_input.size)[0].float(),
            as_map(network, gradient, stage.channels, image_input.size)[0].float(),
        )
        for stage, output, gradient in zip(stages, outputs, gradients, strict=True)
    ]


def _to_array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array
