"""The network to look into: by name, from a checkpoint, or a module that is there already."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from lightspine.data.imagenet_classes import imagenet_synsets, synset_descriptions
from lightspine.data.transforms import Preprocessing
from lightspine.errors import UsageError
from lightspine.models.checkpoint import ModelMetadata, default_preprocessing
from lightspine.models.factory import create_model, load_model
from lightspine.models.registry import find_record
from lightspine.utils.image_files import MIN_SIDE

Size = int | tuple[int, int] | Literal["native"]


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode and what its pictures need.

    Attributes:
        network: the model, on `device`.
        name: what figures call it.
        preprocessing: how its images are prepared.
        class_names: one name per class.
        trained: whether it has the weights of a checkpoint.
        device: torch's name of the device.
        native: images keep their own size, up to a bound.
        saved: how the same network is built anew; `None` for a module that `create_model` did not make.
    """

    network: nn.Module
    name: str
    preprocessing: Preprocessing
    class_names: list[str]
    trained: bool
    device: str = "cpu"
    native: bool = False
    saved: ModelMetadata | None = None

    @property
    def state(self) -> str:
        """Return "trained" or "untrained"."""
        return "trained" if self.trained else "untrained"

    def untrained(self, seed: int = 0) -> "Subject":
        """Return the same architecture with initial weights drawn from a seed.

        Raises:
            UsageError: the module does not say how it is built.
        """
        if self.saved is None:
            raise UsageError(
                f"cannot build {self.name} anew: expected a model that lightspine.create_model made"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = create_model(self.saved.name, **self.saved.kwargs)
        return replace(self, network=network.eval().to(self.device), trained=False)


def open_subject(
    model: str | Path | nn.Module,
    checkpoint: str | Path | None = None,
    *,
    size: Size | None = None,
    device: str = "cpu",
) -> Subject:
    """Load what the functions of `lightspine.analysis` look into.

    Args:
        model: a checkpoint file, the name of a model of lightspine or timm, or a module. A name without a
            checkpoint gets initial weights (seed 0): its maps show the architecture, not what was learned.
        checkpoint: the file of weights for a model's name.
        size: side in px of the image that the network sees, (height, width), or "native" for every image's
            own size, reduced where it has more than `lightspine.analysis.pictures.MOST_PIXELS`; by default
            the checkpoint's.
        device: torch's name of the device.

    Raises:
        UsageError: an unknown name, a missing file, a size that the network does not take, no such device.
        LightspineError: the checkpoint cannot be read.

    Examples:
        >>> from lightspine.analysis import open_subject
        >>> open_subject("shvit_s1", size=64).preprocessing.input_size
        (3, 64, 64)
    """
    _check_device(device)
    if isinstance(model, nn.Module):
        if checkpoint is not None:
            raise UsageError(f"expected a name besides the checkpoint {checkpoint}, got a module")
        network, saved, trained = model.eval(), _describe(model), True
        name = type(model).__name__ if saved is None else saved.name
    else:
        network, saved, trained = _load(model, checkpoint)
        name = saved.name
    config = default_preprocessing(network) if saved is None else saved.preprocessing
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
    known = None if saved is None else saved.class_names
    return Subject(
        network=network.to(device),
        name=name,
        preprocessing=preprocessing,
        class_names=known or _default_names(int(getattr(network, "num_classes", 0))),
        trained=trained,
        device=device,
        native=size == "native",
        saved=saved,
    )


def _load(model: str | Path, checkpoint: str | Path | None) -> tuple[nn.Module, ModelMetadata, bool]:
    name = str(model)
    if checkpoint is not None:
        if Path(model).is_file():
            raise UsageError(f"expected a name besides the checkpoint {checkpoint}, got the file {model}")
        if find_record(name) is not None:
            return *load_model(checkpoint, name=name), True
        network = create_model(name, checkpoint=checkpoint).eval()
        return network, ModelMetadata(name, preprocessing=default_preprocessing(network)), True
    if Path(model).is_file():
        return *load_model(model), True
    if Path(name).suffix or "/" in name:
        raise UsageError(f"expected a checkpoint file, but {name} does not exist")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_model(name).eval()
    return network, ModelMetadata(name, preprocessing=default_preprocessing(network)), False


def _describe(module: nn.Module) -> ModelMetadata | None:
    init_args = cast(dict | None, getattr(module, "init_args", None))
    if init_args is None:
        return None
    return ModelMetadata(init_args["name"], init_args["kwargs"], preprocessing=default_preprocessing(module))


def _default_names(count: int) -> list[str]:
    if count == 1000:
        return synset_descriptions(imagenet_synsets())
    return [str(i) for i in range(count)]


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch raises an AssertionError where it was built without the device.
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error


def _fixed_size(network: nn.Module) -> tuple[int, int] | None:
    """Return the one size that a network takes, or `None` where it takes any."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    if not cfg.get("fixed_input_size"):
        return None
    # A transformer that was built for another size than its weights were published for.
    built: Any = getattr(getattr(network, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
    return int(built[0]), int(built[1])


def _check_size(name: str, fixed: tuple[int, int] | None, height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise UsageError(f"expected a size of at least {MIN_SIDE}x{MIN_SIDE} px, got {height}x{width}")
    if fixed is not None and (height, width) != fixed:
        raise UsageError(f"{name} takes images of {fixed[0]}x{fixed[1]} px only, got {height}x{width}")
