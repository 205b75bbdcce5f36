"""What of a network goes into a file: which outputs it has and what they are called."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from lightspine.errors import UsageError

if TYPE_CHECKING:
    from lightspine.heads.detectors import PyramidBackbone


@dataclass(frozen=True, kw_only=True)
class Target:
    """A network with one input and named outputs.

    Attributes:
        network: maps images to a tensor or a tuple of tensors.
        kind: "classifier", "features", "pyramid" or "segmenter".
        outputs: a name for each output.
        strides: of the maps, where the outputs are maps.
    """

    network: nn.Module
    kind: str
    outputs: tuple[str, ...]
    strides: tuple[int, ...] = field(default=())


def find_target(model: nn.Module) -> Target:
    """Return what is exported of a model.

    A classifier gives "logits" (B, classes), or without classes "features"; a model made with
    `features_only=True` its maps "map0", "map1"..., finest first; a detector the levels of its pyramid
    "level0"..., because its proposals and their suppression are no part of a network that exports well; a
    segmenter "logits" (B, classes, H, W) for every pixel.

    Raises:
        UsageError: the model gives something else.
    """
    # They load torchvision's detectors, and `import lightspine` loads this module.
    from lightspine.heads.detectors import PyramidBackbone
    from lightspine.heads.segmenters import Segmenter

    if isinstance(model, Segmenter):
        return Target(network=model, kind="segmenter", outputs=("logits",))
    body: Any = getattr(model, "backbone", None)
    if isinstance(body, PyramidBackbone):
        return _pyramid(body)
    if isinstance(model, PyramidBackbone):
        return _pyramid(model)
    info: Any = getattr(model, "feature_info", None)
    if hasattr(info, "reduction") and not hasattr(model, "forward_head"):
        strides = tuple(info.reduction())
        names = tuple(f"map{i}" for i in range(len(strides)))
        return Target(network=_InOrder(model), kind="features", outputs=names, strides=strides)
    if not hasattr(model, "num_classes"):
        raise UsageError(
            "expected a classifier, a features_only model, a detector or a segmenter, "
            f"got a {type(model).__name__}"
        )
    name = "logits" if model.num_classes else "features"
    return Target(network=model, kind="classifier", outputs=(name,))


def _pyramid(body: "PyramidBackbone") -> Target:
    names = tuple(f"level{i}" for i in range(len(body.strides)))
    return Target(network=_InOrder(body), kind="pyramid", outputs=names, strides=tuple(body.strides))


class _InOrder(nn.Module):
    """Give the values of a dictionary, or the items of a list, as a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images to the maps."""
        maps = self.network(images)
        return tuple(maps.values()) if isinstance(maps, dict) else tuple(maps)


class WithPreprocessing(nn.Module):
    """A network that takes 8-bit pixels as they lie in an image, (B, H, W, 3), and normalises them itself."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        factor = [1 / (255 * s) for s in std]
        like = next(network.parameters())
        self.register_buffer("factor", like.new_tensor(factor).view(1, -1, 1, 1))
        self.register_buffer(
            "shift", like.new_tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1)
        )
        self.train(network.training)

    factor: Tensor
    shift: Tensor

    def forward(self, pixels: Tensor) -> Any:
        """Map pixels (B, H, W, 3), uint8, to the network's outputs."""
        images = pixels.permute(0, 3, 1, 2).to(self.factor.dtype)
        return self.network(images * self.factor + self.shift)
