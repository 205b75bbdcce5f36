"""Grad-CAM and plain activation maps of every stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.analysis.pictures import ImageLike, Picture, read_picture
from lightspine.analysis.results import ImageResult, Panel
from lightspine.analysis.stages import Stage, as_map, choose_stages, recorded_outputs
from lightspine.analysis.subject import Subject
from lightspine.errors import UsageError


@dataclass(frozen=True)
class CamResult(ImageResult):
    """What speaks for a class, and where a network is active, stage by stage.

    Attributes:
        class_name: the class that is explained.
        probability: what the network gives it, from 0 to 1.
        modules: names of the stages' modules.
        cams: Grad-CAM of each stage, (h, w), at least 0, in the units of logit.
        activations: Euclidean norm over the channels of each stage's map, (h, w).
    """

    class_name: str
    probability: float
    modules: list[str]
    cams: list[np.ndarray]
    activations: list[np.ndarray]

    def rows(self) -> list[list[Panel]]:
        """Return the Grad-CAM of every stage, and the activation of every stage."""
        return [
            [
                Panel(f"Grad-CAM, {m}", v, over=self.picture)
                for m, v in zip(self.modules, self.cams, strict=True)
            ],
            [
                Panel(f"activation, {m}", v, size=self.picture.size)
                for m, v in zip(self.modules, self.activations, strict=True)
            ],
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the maps as cam_MODULE and activation_MODULE."""
        found = super().arrays()
        for module, cam_map, activation in zip(self.modules, self.cams, self.activations, strict=True):
            found |= {f"cam_{module}": cam_map, f"activation_{module}": activation}
        return found

    def heading(self) -> str:
        """Return network, image and explained class."""
        return f"{self.subject}, {self.picture.name}: {self.class_name} ({100 * self.probability:.0f} %)"

    def caption(self) -> str:
        """Return how the maps are scaled."""
        return "every map on its own scale, from 0 (dark) to its maximum (bright)"


def cam(
    subject: Subject,
    images: Iterable[ImageLike],
    *,
    stage: int | None = None,
    target: str | int | None = None,
) -> list[CamResult]:
    """Compute Grad-CAM (Selvaraju et al., ICCV 2017) and activation maps.

    The channels of a stage's map are weighted by the mean of the logit's gradient and summed; the positive
    part remains.

    Args:
        subject: see `lightspine.analysis.open_subject`.
        images: files or open images.
        stage: number in the model's `feature_info`; by default all stages, of a long row of blocks four.
            Stages that the class does not depend on are then left out, as the patches of Vim's last block,
            whose head reads the class token only.
        target: name or number of the class to explain; by default the one that the network decides for.

    Raises:
        UsageError: no such stage or class, or a stage that the class does not depend on.
        LightspineError: an image cannot be read.
    """
    number = None if target is None else find_class(subject.class_names, target)
    stages = choose_stages(subject.network, stage)
    found = []
    for image in images:
        picture = read_picture(subject, image)
        logits, outputs, gradients = _differentiate(subject.network, stages, picture.pixels, number)
        explained = int(logits.argmax()) if number is None else number
        pairs = _as_maps(subject.network, stages, outputs, gradients, picture)
        used = [(each, *pair) for each, pair in zip(stages, pairs, strict=True) if bool(pair[1].any())]
        if not used:
            raise UsageError(
                f"the class does not depend on the map of {stages[0].module} of {subject.name}: "
                "expected an earlier stage"
            )
        found.append(
            CamResult(
                picture,
                f"{subject.name}, {subject.state}",
                class_name=subject.class_names[explained],
                probability=float(logits.softmax(0)[explained]),
                modules=[each.module for each, _, _ in used],
                cams=[grad_cam(features, gradient) for _, features, gradient in used],
                activations=[_array(features.norm(dim=0)) for _, features, _ in used],
            )
        )
    return found


def grad_cam(features: Tensor, gradient: Tensor) -> np.ndarray:
    """Return the Grad-CAM (h, w) of a map (C, h, w) for the gradient (C, h, w) of a logit."""
    weights = gradient.mean((1, 2))
    return _array(torch.einsum("c,chw->hw", weights, features).relu())


def find_class(names: Sequence[str], target: str | int) -> int:
    """Return the number of a class given by name, by the beginning of a name that is unique, or by number.

    Raises:
        UsageError: no class, or more than one, is meant.
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


def _differentiate(
    network: nn.Module, stages: Sequence[Stage], pixels: Tensor, target: int | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the logits, the stages' outputs and the gradients of one logit with respect to them."""
    # Gradients start from the pixels, so that also a network whose weights are frozen has them.
    pixels = pixels.detach().clone().requires_grad_()
    with torch.enable_grad(), recorded_outputs(network, stages) as recorded:
        logits = network(pixels)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] == 0:
            raise UsageError("expected a network with a classifier, got one whose output is no row of logits")
        outputs = [recorded[stage.index] for stage in stages]
        chosen = int(logits[0].argmax()) if target is None else target
        gradients = torch.autograd.grad(logits[0, chosen], outputs, allow_unused=True, materialize_grads=True)
    return logits[0].detach().float(), [output.detach() for output in outputs], list(gradients)


def _as_maps(
    network: nn.Module,
    stages: Sequence[Stage],
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    picture: Picture,
) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            as_map(network, output, stage.channels, picture.size)[0].float(),
            as_map(network, gradient, stage.channels, picture.size)[0].float(),
        )
        for stage, output, gradient in zip(stages, outputs, gradients, strict=True)
    ]


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array
