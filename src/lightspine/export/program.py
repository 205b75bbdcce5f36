"""Export targets (the exported part of a model) and `torch.export` traces with dynamic or fixed sizes."""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import MIN_SIDE

if TYPE_CHECKING:
    from lightspine.heads.detectors import PyramidBackbone


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """The part of a model that is exported: a network with one input and named outputs.

    Attributes:
        network: maps images to a tensor or a tuple of tensors.
        kind: "classifier", "features", "pyramid", "detector" or "segmenter".
        outputs: one name per output.
        strides: strides of the output maps, if the outputs are maps.
    """

    network: nn.Module
    kind: str
    outputs: tuple[str, ...]
    strides: tuple[int, ...] = field(default=())


def find_target(model: nn.Module, *, whole_detector: bool = False, class_map: bool = False) -> ExportTarget:
    """Find the part of a model that is exported.

    | model | outputs |
    | --- | --- |
    | classifier | "logits" (B, classes), or "features" if it has no classes |
    | `features_only=True` | "map0", "map1", ... from the finest to the coarsest map |
    | detector | with `whole_detector` its detections, else as its backbone |
    | backbone of a detector | pyramid levels "level0", "level1", ... |
    | segmenter | "logits" (B, classes, H, W) |

    Args:
        model: in evaluation mode.
        whole_detector: export a detector with decoding, NMS and masks.
        class_map: export the class of every pixel instead of a segmenter's logits, as "classes" (B, H, W).

    Raises:
        UsageError: the model is of another kind or in training mode, or a class map of no segmenter.
    """
    # Imported here because these load torchvision's detectors, and `import lightspine` loads this module.
    from lightspine.heads.detectors import PyramidBackbone
    from lightspine.heads.mask_rcnn import MaskRCNN
    from lightspine.heads.retinanet import RetinaNet
    from lightspine.heads.segmenters import Segmenter

    if class_map and not isinstance(model, Segmenter):
        raise UsageError(f"expected a segmenter for a class map, got a {type(model).__name__}")
    target = None
    body: Any = getattr(model, "backbone", None)
    info: Any = getattr(model, "feature_info", None)
    if isinstance(model, Segmenter) and class_map:
        target = ExportTarget(network=_ClassMap(model), kind="segmenter", outputs=("classes",))
    elif isinstance(model, Segmenter):
        target = ExportTarget(network=model, kind="segmenter", outputs=("logits",))
    elif whole_detector and isinstance(model, RetinaNet | MaskRCNN):
        from lightspine.export.detection import detector_outputs

        target = ExportTarget(network=model, kind="detector", outputs=detector_outputs(model))
    elif isinstance(body, PyramidBackbone):
        target = _pyramid_target(body)
    elif isinstance(model, PyramidBackbone):
        target = _pyramid_target(model)
    elif hasattr(info, "reduction") and not hasattr(model, "forward_head"):
        strides = tuple(info.reduction())
        names = tuple(f"map{i}" for i in range(len(strides)))
        target = ExportTarget(network=_TupleOutput(model), kind="features", outputs=names, strides=strides)
    elif hasattr(model, "num_classes"):
        name = "logits" if model.num_classes else "features"
        target = ExportTarget(network=model, kind="classifier", outputs=(name,))
    if target is None:
        raise UsageError(
            "expected a classifier, a features_only model, a detector or a segmenter, "
            f"got a {type(model).__name__}"
        )
    if any(module.training for module in model.modules()):
        raise UsageError(
            "expected a model in evaluation mode (model.eval()) to export, got one in training mode"
        )
    return target


def _pyramid_target(body: "PyramidBackbone") -> ExportTarget:
    names = tuple(f"level{i}" for i in range(len(body.strides)))
    return ExportTarget(
        network=_TupleOutput(body), kind="pyramid", outputs=names, strides=tuple(body.strides)
    )


class _ClassMap(nn.Module):
    """Returns the class of the highest logit of each pixel, int64 (B, H, W)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        classes: Tensor = self.network(images).argmax(1)
        return classes


class _TupleOutput(nn.Module):
    """Returns the values of a dictionary, or the items of a list, as a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.network(images)
        return tuple(maps.values()) if isinstance(maps, dict) else tuple(maps)


class WithPreprocessing(nn.Module):
    """A network that takes 8-bit pixels (B, H, W, 3) and normalizes them itself."""

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
        """Apply the network to pixels (B, H, W, 3), uint8."""
        images = pixels.permute(0, 3, 1, 2).to(self.factor.dtype)
        return self.network(images * self.factor + self.shift)


def example_input(channels: int, size: tuple[int, int] | None, pixels: bool) -> Tensor:
    """Create images to trace with; without a fixed size, height and width differ.

    Args:
        channels: number of channels.
        size: fixed (height, width), or `None`.
        pixels: create 8-bit pixels (B, H, W, C) instead of normalized images (B, C, H, W).
    """
    # Equal sides could be mistaken for one dimension by the tracer.
    height, width = size or (224, 192)
    if pixels:
        return torch.randint(0, 256, (2, height, width, channels), dtype=torch.uint8)
    return torch.randn(2, channels, height, width)


def trace(network: nn.Module, images: Tensor, *, fixed: bool, fixed_batch: bool = False) -> ExportedProgram:
    """Trace a network with `torch.export`; every scan becomes one node.

    Args:
        network: in evaluation mode.
        images: from `example_input`.
        fixed: fix the height and width to those of the images; else they are dynamic.
        fixed_batch: fix the batch size as well; else it is dynamic.

    Raises:
        LightspineError: PyTorch cannot trace the network.
    """
    sides = (1, 2) if images.dtype == torch.uint8 else (2, 3)
    axes = (*(() if fixed_batch else (0,)), *(() if fixed else sides))
    dynamic: dict[int, Any] = dict.fromkeys(axes, Dim.DYNAMIC)
    return export_program(network, (images,), (dynamic,), type(network).__name__)


def export_program(module: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any, what: str) -> ExportedProgram:
    """Trace a module with `torch.export` for inference, with dynamic shapes.

    Args:
        module: in evaluation mode.
        inputs: example inputs.
        dynamic: `dynamic_shapes` of `torch.export.export`.
        what: name of what is exported, for the error.

    Raises:
        LightspineError: PyTorch cannot export the module.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # PyTorch and torchvision warn about their own internals.
            warnings.filterwarnings("ignore", module=r"(torch|torchvision|copyreg)(\.|$)")
            return torch.export.export(module, inputs, dynamic_shapes=dynamic)
    except Exception as error:
        # The rest of the message is a report of many lines.
        reason = str(error).partition("\n")[0]
        raise LightspineError(
            f"PyTorch cannot export this {what}: {type(error).__name__}: {reason}"
        ) from error


def check_fixed_size(size: tuple[int, int] | None) -> None:
    """Check that models take images of a fixed size.

    Raises:
        UsageError: a side is below 32 pixels.
    """
    if size is not None and min(size) < MIN_SIDE:
        raise UsageError(
            f"expected a fixed size of at least {MIN_SIDE}x{MIN_SIDE} px, got {size[0]}x{size[1]}"
        )
