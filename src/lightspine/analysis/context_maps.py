"""What EfficientMod multiplies its values with: the averages of its context layers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.analysis.pictures import ImageLike, read_picture
from lightspine.analysis.results import ImageResult, Panel
from lightspine.analysis.stages import choose_layers
from lightspine.analysis.subject import Subject
from lightspine.errors import UsageError
from lightspine.models.efficientmod import ContextLayer


@dataclass(frozen=True)
class ContextResult(ImageResult):
    """The context of some layers.

    Attributes:
        modules: names of the context layers.
        contexts: mean over the channels of each layer's output, (h, w); of both signs.
    """

    modules: list[str]
    contexts: list[np.ndarray]

    def rows(self) -> list[list[Panel]]:
        """Return the layers' maps, each from its least to its largest value."""
        names = [module.removesuffix(".mlp.context") for module in self.modules]
        pairs = zip(names, self.contexts, strict=True)
        return [[Panel(name, values - values.min(), size=self.picture.size) for name, values in pairs]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the maps by the names of their layers."""
        return super().arrays() | dict(zip(self.modules, self.contexts, strict=True))

    def heading(self) -> str:
        """Return network and image."""
        return f"{self.subject}, {self.picture.name}: context averages"

    def caption(self) -> str:
        """Return how the maps are scaled."""
        return (
            "mean over channels of what modulates the values; every map from its least to its largest value"
        )


def context(
    subject: Subject, images: Iterable[ImageLike], *, stage: int | None = None
) -> list[ContextResult]:
    """Average the context layers of EfficientMod over their channels (Ma et al., ICLR 2024, section 3.2).

    Args:
        subject: see `lightspine.analysis.open_subject`.
        images: files or open images.
        stage: number in the model's `feature_info`: all layers of this stage; by default the last layer of
            every stage whose map has more than one position.

    Raises:
        UsageError: the network has no context layers, or none in this stage.
        LightspineError: an image cannot be read.
    """
    network = subject.network
    layers = {name: module for name, module in network.named_modules() if isinstance(module, ContextLayer)}
    if not layers:
        raise UsageError(f"{subject.name} has no context layers: only the EfficientMod family has")
    chosen = choose_layers(network, layers, stage)
    found = []
    for image in images:
        picture = read_picture(subject, image)
        outputs: dict[str, Tensor] = {}
        handles = [layers[name].register_forward_hook(_keeper(outputs, name)) for name in chosen]
        try:
            with torch.no_grad():
                network(picture.pixels)
        finally:
            for handle in handles:
                handle.remove()
        # Of the last stages of a small image a single position may be left, which is no map.
        shown = [name for name in chosen if stage is not None or outputs[name][0, ..., 0].numel() > 1]
        maps = [outputs[name][0].float().mean(-1).cpu().numpy() for name in shown]
        found.append(ContextResult(picture, f"{subject.name}, {subject.state}", shown, maps))
    return found


def _keeper(outputs: dict[str, Tensor], name: str) -> Any:
    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[name] = output.detach()

    return keep
