"""The model to analyze: by name, from a checkpoint file, or an existing module."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from lightspine.data.imagenet_classes import imagenet_synsets, synset_descriptions
from lightspine.data.transforms import Preprocessing
from lightspine.errors import UsageError
from lightspine.models.factory import create_model, load_model
from lightspine.models.loading import is_checkpoint
from lightspine.models.metadata import ModelMetadata, default_preprocessing
from lightspine.models.registry import TIMM_PREFIX, find_record
from lightspine.utils.devices import check_device
from lightspine.utils.image_files import MIN_SIDE

Size = int | tuple[int, int] | Literal["native"]


@dataclass(frozen=True)
class ModelHandle:
    """A model in evaluation mode with its preprocessing, class names and name.

    Attributes:
        network: the model, on `device`.
        name: name of the model in figures.
        preprocessing: preprocessing of the images.
        class_names: one name per class.
        trained: whether the weights come from a checkpoint.
        device: name of the device in PyTorch.
        native: whether images keep their own size, up to `MAX_PIXELS`.
        metadata: constructor arguments and preprocessing; `None` for a module that `create_model` did not
            create.
    """

    network: nn.Module
    name: str
    preprocessing: Preprocessing
    class_names: list[str]
    trained: bool
    device: str = "cpu"
    native: bool = False
    metadata: ModelMetadata | None = None

    @property
    def state(self) -> str:
        """Return "trained" or "untrained"."""
        return "trained" if self.trained else "untrained"

    def untrained(self, seed: int = 0) -> "ModelHandle":
        """Create the same architecture with randomly initialized weights.

        Raises:
            UsageError: the model was not created by `create_model`.
        """
        if self.metadata is None:
            raise UsageError(
                f"cannot create {self.name} with untrained weights: expected a model created by "
                "lightspine.create_model"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = create_model(self.metadata.name, **self.metadata.kwargs)
        return replace(self, network=network.eval().to(self.device), trained=False)


def open_model(
    model: str | Path | nn.Module,
    checkpoint: str | Path | None = None,
    *,
    size: Size | None = None,
    device: str = "cpu",
) -> ModelHandle:
    """Load a model for the functions of `lightspine.analysis`.

    Args:
        model: a checkpoint file, the name of a model of lightspine or timm, or a module. A name without a
            checkpoint gets randomly initialized weights (seed 0).
        checkpoint: a file of weights for a model given by name.
        size: side of the input image in pixels, (height, width), or "native" for the size of each image
            (reduced if it has more than `lightspine.analysis.image_input.MAX_PIXELS`); by default that of the
            checkpoint.
        device: name of the device in PyTorch.

    Raises:
        UsageError: an unknown name, a missing file, a size that the model does not take, or a missing device.
        LightspineError: the checkpoint cannot be read.

    Examples:
        >>> from lightspine.analysis import open_model
        >>> open_model("shvit_s1", size=64).preprocessing.input_size
        (3, 64, 64)
    """
    check_device(device)
    if isinstance(model, nn.Module):
        if checkpoint is not None:
            raise UsageError(f"expected a name besides the checkpoint {checkpoint}, got a module")
        network, metadata, trained = model.eval(), _metadata_of(model), True
        name = type(model).__name__ if metadata is None else metadata.name
    else:
        network, metadata, trained = _load_network(model, checkpoint)
        name = metadata.name
    config = default_preprocessing(network) if metadata is None else metadata.preprocessing
    preprocessing = Preprocessing.from_config(config)
    fixed = _fixed_size(network)
    if fixed is not None:
        preprocessing = replace(preprocessing, input_size=(preprocessing.input_size[0], *fixed))
    if size is not None and size != "native":
        height, width = (size, size) if isinstance(size, int) else size
        _check_size(name, fixed, height, width)
        preprocessing = replace(preprocessing, input_size=(preprocessing.input_size[0], height, width))
    if size == "native" and fixed is not None:
        raise UsageError(f"{name} takes images of {fixed[0]}x{fixed[1]} px only, not their native size")
    known = None if metadata is None else metadata.class_names
    return ModelHandle(
        network=network.to(device),
        name=name,
        preprocessing=preprocessing,
        class_names=known or _default_class_names(int(getattr(network, "num_classes", 0))),
        trained=trained,
        device=device,
        native=size == "native",
        metadata=metadata,
    )


def _load_network(model: str | Path, checkpoint: str | Path | None) -> tuple[nn.Module, ModelMetadata, bool]:
    name = str(model)
    if checkpoint is not None:
        if is_checkpoint(model):
            raise UsageError(f"expected a name besides the checkpoint {checkpoint}, got the file {model}")
        if find_record(name) is not None:
            return *load_model(checkpoint, name=name), True
        network = create_model(name, checkpoint=checkpoint).eval()
        return network, ModelMetadata(name, preprocessing=default_preprocessing(network)), True
    if is_checkpoint(model):
        return *load_model(model), True
    if Path(name).suffix or "/" in name.removeprefix(TIMM_PREFIX):
        raise UsageError(f"expected a checkpoint file, but {name} does not exist")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_model(name).eval()
    return network, ModelMetadata(name, preprocessing=default_preprocessing(network)), False


def _metadata_of(module: nn.Module) -> ModelMetadata | None:
    init_args = cast(dict | None, getattr(module, "init_args", None))
    if init_args is None:
        return None
    return ModelMetadata(init_args["name"], init_args["kwargs"], preprocessing=default_preprocessing(module))


def _default_class_names(count: int) -> list[str]:
    if count == 1000:
        return synset_descriptions(imagenet_synsets())
    return [str(i) for i in range(count)]


def _fixed_size(network: nn.Module) -> tuple[int, int] | None:
    """Return the only size that a network takes, or `None` if it takes any size."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    if not cfg.get("fixed_input_size"):
        return None
    # The size that a transformer was created for may differ from the published one.
    built: Any = getattr(getattr(network, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
    return int(built[0]), int(built[1])


def _check_size(name: str, fixed: tuple[int, int] | None, height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise UsageError(f"expected a size of at least {MIN_SIDE}x{MIN_SIDE} px, got {height}x{width}")
    if fixed is not None and (height, width) != fixed:
        raise UsageError(f"{name} takes images of {fixed[0]}x{fixed[1]} px only, got {height}x{width}")
