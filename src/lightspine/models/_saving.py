"""Our own checkpoint: a safetensors file that says how to build its model and prepare its images."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn as nn
from safetensors.torch import save

from lightspine._version import __version__
from lightspine.errors import LightspineError, UsageError
from lightspine.models._reading import CheckpointFile

NETWORK_KEY = "lightspine.network"
"""What marks a file of a detector or segmenter, which holds a model without a classifier and a head."""

PREPROCESSING_KEYS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass
class SavedModel:
    """What a lightspine file says about its model.

    Attributes:
        name: registered name.
        kwargs: arguments of `create_model`.
        class_names: one name per class, or `None`.
        preprocessing: `input_size` (channels, height, width), `interpolation`, `mean`, `std`, `crop_pct`,
            `crop_mode`.
        metadata: further strings.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def default_preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return how the published evaluation of a model prepares its images."""
    cfg = getattr(model, "pretrained_cfg", {})
    return {key: cfg[key] for key in PREPROCESSING_KEYS if key in cfg}


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Save a model that `lightspine.create_model` made as one safetensors file.

    Args:
        model: the model; its name and creation arguments go into the file.
        path: file to write, replaced in one step if it exists.
        class_names: one name per class.
        preprocessing: how images are prepared (see `SavedModel`); by default as published.
        metadata: further strings, such as the score.

    Returns:
        The path.

    Raises:
        UsageError: the name does not end in .safetensors, or the model was not made by `create_model`.
        LightspineError: the file cannot be written.
    """
    creation = getattr(model, "creation", None)
    if creation is None:
        raise UsageError(
            "expected a model that lightspine.create_model made: a file says how to build its model"
        )
    saved = {
        "lightspine.model": creation["name"],
        "lightspine.kwargs": json.dumps(creation["kwargs"]),
        "lightspine.preprocessing": json.dumps(preprocessing or default_preprocessing(model)),
        **(metadata or {}),
    }
    if class_names is not None:
        saved["lightspine.class_names"] = json.dumps(class_names)
    return write_safetensors(model, path, saved)


def write_safetensors(module: nn.Module, path: str | Path, metadata: dict[str, str]) -> Path:
    """Write the tensors of a module with metadata, in one step.

    Raises:
        UsageError: the name does not end in .safetensors.
        LightspineError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"expected a file name that ends in .safetensors, received {path.name!r}")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
    about = {"format": "pt", "lightspine.version": __version__}
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written here and not by the library, which makes files that only their owner may read.
        part.write_bytes(save(tensors, metadata=about | metadata))
        part.replace(path)
    except OSError as error:
        raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_saved_model(file: CheckpointFile) -> SavedModel | None:
    """Return what a file says about its model, or `None` when lightspine did not write it."""
    known = dict(file.metadata)
    if NETWORK_KEY in known:
        raise UsageError(f"{file.label} holds a detector or segmenter, expected a classifier's weights")
    name = known.pop("lightspine.model", None)
    if name is None:
        return None
    try:
        kwargs = json.loads(known.pop("lightspine.kwargs", "{}"))
        preprocessing = json.loads(known.pop("lightspine.preprocessing", "{}"))
        class_names = json.loads(known.pop("lightspine.class_names", "null"))
    except json.JSONDecodeError as error:
        raise LightspineError(f"{file.label} has damaged metadata: {error}") from error
    return SavedModel(name, kwargs, class_names, preprocessing, known)
