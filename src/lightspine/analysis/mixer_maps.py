"""Maps of family-specific mixers: contexts of EfficientMod, hidden-state importance of EfficientViM."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.analysis.figure_grid import Panel
from lightspine.analysis.image_input import ImageLike, read_image
from lightspine.analysis.model_handle import ModelHandle
from lightspine.analysis.results import ImageResult
from lightspine.analysis.stages import record_outputs, select_layers
from lightspine.errors import UsageError
from lightspine.models.efficientmod import ContextLayer
from lightspine.models.efficientvim import HSMSSD, NCSSD


@dataclass(frozen=True)
class ContextResult(ImageResult):
    """Outputs of context layers of EfficientMod.

    Attributes:
        modules: names of the context layers.
        contexts: mean over the channels of each layer's output, (h, w), with both signs.
    """

    modules: list[str]
    contexts: list[np.ndarray]

    def rows(self) -> list[list[Panel]]:
        """Return one row with the map of each layer."""
        names = [module.removesuffix(".mlp.context") for module in self.modules]
        pairs = zip(names, self.contexts, strict=True)
        return [[Panel(name, values - values.min(), size=self.image.size) for name, values in pairs]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: image, and the map of each layer under its name."""
        return super().arrays() | dict(zip(self.modules, self.contexts, strict=True))

    def heading(self) -> str:
        """Return the text above the figure: model and image."""
        return f"{self.model}, {self.image.name}: context averages"

    def caption(self) -> str:
        """Return the text below the figure, which explains the scales."""
        return "mean over channels of the context; each map on its own scale, from its minimum to its maximum"


def context(
    handle: ModelHandle, images: Iterable[ImageLike], *, stage: int | None = None
) -> list[ContextResult]:
    """Compute the channel means of EfficientMod's context layers (Ma et al., ICLR 2024, section 3.2).

    The output of a context layer modulates the values by an element-wise product.

    Args:
        handle: see `lightspine.analysis.open_model`.
        images: files or open images.
        stage: index of a stage in the model's `feature_info`, of which all layers are shown; by default the
            last layer of each stage whose map has more than one position.

    Raises:
        UsageError: the model or the stage has no context layers.
        LightspineError: an image cannot be read.
    """
    network = handle.network
    layers = {name: module for name, module in network.named_modules() if isinstance(module, ContextLayer)}
    if not layers:
        raise UsageError(f"{handle.name} has no context layers, expected a model of the EfficientMod family")
    chosen = select_layers(network, layers, stage)
    found = []
    for image in images:
        image_input = read_image(handle, image)
        with torch.no_grad(), record_outputs(network, chosen) as outputs:
            network(image_input.pixels)
        # For a small image, the maps of the last stages may have a single position.
        shown = [name for name in chosen if stage is not None or outputs[name][0, ..., 0].numel() > 1]
        maps = [outputs[name][0].float().mean(-1).cpu().numpy() for name in shown]
        found.append(ContextResult(image_input, f"{handle.name}, {handle.state}", shown, maps))
    return found


@dataclass(frozen=True)
class ImportanceResult(ImageResult):
    """Importance of each position for the hidden state of EfficientViM's mixers.

    Attributes:
        modules: names of the mixers.
        writes: weight of each position in writing the state, (h, w) per mixer; each map sums to 1.
        reads: weight of each position in reading the state, likewise.
    """

    modules: list[str]
    writes: list[np.ndarray]
    reads: list[np.ndarray]

    def rows(self) -> list[list[Panel]]:
        """Return one row of `writes` maps and one of `reads` maps."""
        names = [module.removesuffix(".mixer") for module in self.modules]
        return [
            [Panel(f"{kind}, {n}", v, size=self.image.size) for n, v in zip(names, maps, strict=True)]
            for kind, maps in (("written", self.writes), ("read", self.reads))
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: image, write_MODULE and read_MODULE."""
        found = super().arrays()
        for module, write, read in zip(self.modules, self.writes, self.reads, strict=True):
            found |= {f"write_{module}": write, f"read_{module}": read}
        return found

    def heading(self) -> str:
        """Return the text above the figure: model and image."""
        return f"{self.model}, {self.image.name}: importance for the hidden state"

    def caption(self) -> str:
        """Return the text below the figure, which explains the scales."""
        return "share of each position in the weights of all states; each map on its own scale"


def importance(
    handle: ModelHandle, images: Iterable[ImageLike], *, stage: int | None = None
) -> list[ImportanceResult]:
    """Compute the weights with which positions write and read the hidden state of EfficientViM's mixers.

    A mixer's hidden state is h = x (W * B)^T and its output y = h C (EfficientViM, section 3.2). The
    importance of a position is the sum over the N states of |W * B| for writing and of |C| for reading.

    Args:
        handle: see `lightspine.analysis.open_model`.
        images: files or open images.
        stage: index of a stage in the model's `feature_info`, of which all mixers are shown; by default the
            last mixer of each stage.

    Raises:
        UsageError: the model or the stage has no such mixers.
        LightspineError: an image cannot be read.
    """
    mixers = {
        name: module for name, module in handle.network.named_modules() if isinstance(module, HSMSSD | NCSSD)
    }
    if not mixers:
        raise UsageError(
            f"{handle.name} has no hidden-state mixers, expected a model of the EfficientViM family"
        )
    chosen = select_layers(handle.network, mixers, stage)
    found = []
    for image in images:
        image_input = read_image(handle, image)
        weights = written_and_read(
            handle.network, {name: mixers[name] for name in chosen}, image_input.pixels
        )
        found.append(
            ImportanceResult(
                image_input,
                f"{handle.name}, {handle.state}",
                chosen,
                writes=[_normalize(weights[name][0]) for name in chosen],
                reads=[_normalize(weights[name][1]) for name in chosen],
            )
        )
    return found


def written_and_read(
    network: nn.Module, mixers: dict[str, HSMSSD | NCSSD], pixels: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a network on one image and return its mixers' signed weights W * B and C, both (N, h, w)."""
    inputs: dict[str, Tensor] = {}

    def record_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs[name] = given[0].detach()

        return hook

    # The hook is on the projection, because the forward method of a mixer is not always called.
    hooks = [mixer.bcdt_proj.register_forward_pre_hook(record_input(name)) for name, mixer in mixers.items()]
    try:
        with torch.no_grad():
            network(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name, mixer in mixers.items():
            size = inputs[name].shape[2:]
            write, read = mixer.write_and_read(inputs[name])
            as_maps = [each[0].t().unflatten(1, size).float().cpu() for each in (write, read)]
            found[name] = as_maps[0], as_maps[1]
    return found


def _normalize(weights: Tensor) -> np.ndarray:
    total = weights.abs().sum(0).double()
    array: np.ndarray = (total / total.sum()).numpy()
    return array
