"""How much every position writes to EfficientViM's hidden state, and how much it reads from it."""

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
from lightspine.models.efficientvim import HSMSSD, NCSSD


@dataclass(frozen=True)
class ImportanceResult(ImageResult):
    """The importance of every position for the hidden states of some mixers.

    Attributes:
        modules: names of the mixers.
        writes: share of every position in what is written, (h, w); the sum of a map is 1.
        reads: share of every position in what is read, likewise.
    """

    modules: list[str]
    writes: list[np.ndarray]
    reads: list[np.ndarray]

    def rows(self) -> list[list[Panel]]:
        """Return, for every mixer, what is written, and below what is read."""
        names = [module.removesuffix(".mixer") for module in self.modules]
        return [
            [Panel(f"{kind}, {n}", v, size=self.picture.size) for n, v in zip(names, maps, strict=True)]
            for kind, maps in (("written", self.writes), ("read", self.reads))
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the maps as write_MODULE and read_MODULE."""
        found = super().arrays()
        for module, write, read in zip(self.modules, self.writes, self.reads, strict=True):
            found |= {f"write_{module}": write, f"read_{module}": read}
        return found

    def heading(self) -> str:
        """Return network and image."""
        return f"{self.subject}, {self.picture.name}: importance for the hidden state"

    def caption(self) -> str:
        """Return how the maps are scaled."""
        return "share of each position in the weights of all states; every map on its own scale"


def importance(
    subject: Subject, images: Iterable[ImageLike], *, stage: int | None = None
) -> list[ImportanceResult]:
    """Measure the weights with which positions enter and leave the hidden state of EfficientViM's mixers.

    A mixer's hidden state is h = x (W * B)^T and its output y = h C (EfficientViM, section 3.2). The
    importance of a position is the sum of |W * B| (written) and of |C| (read) over the N states.

    Args:
        subject: see `lightspine.analysis.open_subject`.
        images: files or open images.
        stage: number in the model's `feature_info`: all mixers of this stage; by default the last mixer of
            every stage.

    Raises:
        UsageError: the network has no such mixers, or none in this stage.
        LightspineError: an image cannot be read.
    """
    mixers = {
        name: module for name, module in subject.network.named_modules() if isinstance(module, HSMSSD | NCSSD)
    }
    if not mixers:
        raise UsageError(f"{subject.name} has no hidden-state mixers: only the EfficientViM family has")
    chosen = choose_layers(subject.network, mixers, stage)
    found = []
    for image in images:
        picture = read_picture(subject, image)
        weights = written_and_read(subject.network, {name: mixers[name] for name in chosen}, picture.pixels)
        found.append(
            ImportanceResult(
                picture,
                f"{subject.name}, {subject.state}",
                chosen,
                writes=[_share(weights[name][0]) for name in chosen],
                reads=[_share(weights[name][1]) for name in chosen],
            )
        )
    return found


def written_and_read(
    network: nn.Module, mixers: dict[str, HSMSSD | NCSSD], pixels: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a network on one image and return what its mixers write and read, both (N, h, w) with signs."""
    inputs: dict[str, Tensor] = {}
    # The projection, as a mixer is run for its state and not called as a module.
    handles = [
        mixer.bcdt_proj.register_forward_pre_hook(_keeper(inputs, name)) for name, mixer in mixers.items()
    ]
    try:
        with torch.no_grad():
            network(pixels)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name, mixer in mixers.items():
            size = inputs[name].shape[2:]
            write, read = mixer.write_and_read(inputs[name])
            as_maps = [each[0].t().unflatten(1, size).float().cpu() for each in (write, read)]
            found[name] = as_maps[0], as_maps[1]
    return found


def _share(weights: Tensor) -> np.ndarray:
    total = weights.abs().sum(0).double()
    array: np.ndarray = (total / total.sum()).numpy()
    return array


def _keeper(inputs: dict[str, Tensor], name: str) -> Any:
    def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[name] = given[0].detach()

    return keep
