"""A checkpoint file in, a model out: for whoever has a file and not its name."""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.errors import LightspineError
from lightspine.models._checkpoints import load_checkpoint_file
from lightspine.models._factory import create_model
from lightspine.models._identify import identify_tensors
from lightspine.models._reading import CheckpointFile, Weights, read_checkpoint
from lightspine.models._registry import get_record
from lightspine.models._saving import SavedModel, default_preprocessing, read_saved_model, save_checkpoint


def load_model(
    path: str | Path, *, name: str | None = None, weights: Weights = "auto", **kwargs: Any
) -> tuple[nn.Module, SavedModel]:
    """Build the model that a checkpoint file is of, and load it.

    Args:
        path: one of our files, or an official or timm file, whose variant is told from its tensors.
        name: registered name, for a file that does not tell.
        weights: "model", "ema", or "auto" for the entry whose score is published.
        **kwargs: arguments of the model that take the place of those that the file tells.

    Returns:
        The model in evaluation mode (`model.load_report` tells what was loaded), and what is known about it.

    Raises:
        UsageError: no such file, entry or name.
        LightspineError: the file cannot be read, or no registered model fits it.
    """
    file = read_checkpoint(path)
    saved = read_saved_model(file)
    if saved is None or (name is not None and name != saved.name):
        saved = _describe(file, name, weights)
    saved.kwargs = saved.kwargs | kwargs
    model: Any = create_model(saved.name, **saved.kwargs)
    model.load_report = load_checkpoint_file(model, file, weights=weights, drop_head=False)
    saved.preprocessing = saved.preprocessing or default_preprocessing(model)
    return cast(nn.Module, model.eval()), saved


def convert_checkpoint(
    source: str | Path, target: str | Path, *, name: str | None = None, weights: Weights = "auto"
) -> nn.Module:
    """Write an official, timm or Lightning checkpoint as one of ours.

    Args:
        source: file to read.
        target: .safetensors file to write.
        name: registered name; by default told from the tensors.
        weights: "model", "ema", or "auto" for the entry whose score is published.

    Returns:
        The model that was written; `model.load_report` tells what was converted.

    Raises:
        UsageError: no such file, entry or name; the target does not end in .safetensors.
        LightspineError: the file cannot be read, or no registered model fits it.
    """
    model, saved = load_model(source, name=name, weights=weights)
    save_checkpoint(
        model,
        target,
        class_names=saved.class_names,
        preprocessing=saved.preprocessing,
        metadata=saved.metadata,
    )
    return model


def _describe(file: CheckpointFile, name: str | None, weights: Weights) -> SavedModel:
    tensors = next(iter(file.entries.values())) if weights == "auto" else file.entries[file.select(weights)]
    if name is None:
        guess = identify_tensors(tensors)
        if guess is None:
            raise LightspineError(
                f"{file.label} is of no registered model: pass the model's name if it is timm's"
            )
        name = guess.name
    return SavedModel(name, _creation_arguments(name, tensors))


def _creation_arguments(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Read number of classes, input channels and the family's own sizes off the tensors."""
    record = get_record(name)
    with torch.device("meta"):
        model: Any = record.create()
    cfg = model.default_cfg
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    fitted = record.checkpoint_filter_fn(shapes, model)
    kwargs: dict[str, Any] = dict(record.infer_kwargs(tensors)) if record.infer_kwargs else {}
    first_conv, classifier = cfg["first_conv"], cfg["classifier"]
    head = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if head in fitted and fitted[head].shape[0] != cfg["num_classes"]:
        kwargs["num_classes"] = fitted[head].shape[0]
    stem = f"{first_conv}.weight"
    if stem in fitted and fitted[stem].shape[1] != cfg["input_size"][0]:
        kwargs["in_chans"] = fitted[stem].shape[1]
    return kwargs
