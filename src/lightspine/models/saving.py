"""Saving of models as safetensors files, from which they are rebuilt."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save

from lightspine._version import __version__
from lightspine.errors import UsageError
from lightspine.models.checkpoint import LAYER_WRAPPERS, VERSION_KEY
from lightspine.models.metadata import RUN_KEY, default_preprocessing
from lightspine.utils.files import atomic_write


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    run: dict[str, Any] | None = None,
) -> Path:
    """Save a model made by `lightspine.create_model` as a safetensors file that rebuilds it.

    Args:
        model: the model; its name and arguments are saved with its weights. `reset_classifier` may have
            changed its classes.
        path: file to write; an existing file is replaced atomically.
        class_names: one name per class.
        preprocessing: image preprocessing (see `ModelMetadata`); by default the published one.
        metadata: further strings, such as the score.
        run: see `ModelMetadata`.

    Returns:
        The path.

    Raises:
        UsageError: the file name does not end in .safetensors, `create_model` did not make the model, or its
            layers have been replaced since, as by `lightspine.optimize`.
        LightspineError: the file cannot be written.
    """
    described = model_metadata(model, class_names=class_names, preprocessing=preprocessing)
    described["lightspine.kwargs"] = json.dumps(_rebuilding_arguments(model))
    if run:
        described[RUN_KEY] = json.dumps(run)
    return write_safetensors(model, path, described | (metadata or {}))


def _rebuilding_arguments(model: Any) -> dict[str, Any]:
    """Return the arguments by which `create_model` rebuilds a model as it is now.

    Raises:
        UsageError: no arguments do, because other layers have been replaced than the classifier.
    """
    from lightspine.models.factory import create_model

    name, kwargs = model.init_args["name"], dict(model.init_args["kwargs"])
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        rebuilt: Any = create_model(name, **kwargs)
        changed = {
            key: value
            for key, value in _classifier_arguments(model).items()
            if value != _classifier_arguments(rebuilt).get(key)
        }
        if changed:
            kwargs |= changed
            rebuilt = create_model(name, **kwargs)
    expected = {key: tensor.shape for key, tensor in rebuilt.state_dict().items()}
    # A reader strips the names of compiled layers, too.
    received = {LAYER_WRAPPERS.sub("", key): tensor.shape for key, tensor in model.state_dict().items()}
    if expected != received:
        differing = [key for key in expected | received if expected.get(key) != received.get(key)]
        raise UsageError(
            f"expected {name} with the tensors that lightspine.create_model gives it, but {len(differing)} "
            f"differ, such as {differing[0]}: save the model before lightspine.optimize, quantization or "
            "adapters change its layers"
        )
    return kwargs


def _classifier_arguments(model: Any) -> dict[str, Any]:
    """Return what `reset_classifier` may have changed, as arguments of the constructor."""
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    found = {"num_classes": getattr(model, "num_classes", None), "global_pool": pool}
    return {key: value for key, value in found.items() if isinstance(value, int | str)}


def model_metadata(
    model: nn.Module,
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return the metadata that rebuild a model made by `lightspine.create_model`; see `save_checkpoint`.

    Raises:
        UsageError: `create_model` did not make the model.
    """
    init_args = getattr(model, "init_args", None)
    if init_args is None:
        raise UsageError(
            "expected a model made by lightspine.create_model: the file stores the arguments that rebuild it"
        )
    strings = {
        "lightspine.model": init_args["name"],
        "lightspine.kwargs": json.dumps(init_args["kwargs"]),
        "lightspine.preprocessing": json.dumps(preprocessing or default_preprocessing(model)),
    }
    if class_names is not None:
        strings["lightspine.class_names"] = json.dumps(class_names)
    return strings


def write_safetensors(module: nn.Module, path: str | Path, metadata: dict[str, str]) -> Path:
    """Write the state dict of a module with string metadata, atomically.

    Raises:
        UsageError: the file name does not end in .safetensors.
        LightspineError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"expected a file name that ends in .safetensors, received {path.name!r}")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
    header = {"format": "pt", VERSION_KEY: __version__} | metadata
    # safetensors' own save_file creates files that only their owner may read.
    with atomic_write(path) as file:
        file.write(save(tensors, metadata=header))
    return path
