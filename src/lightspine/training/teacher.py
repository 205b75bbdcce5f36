"""A teacher for distillation: a trained model with the student's classes, and how it wants its images."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from lightspine.errors import LightspineError, UsageError
from lightspine.models._checkpoints import load_checkpoint_file
from lightspine.models._factory import create_model
from lightspine.models._loading import load_model
from lightspine.models._reading import CheckpointFile, read_checkpoint
from lightspine.models._registry import find_record
from lightspine.models._saving import read_saved_model

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def create_teacher(
    name: str, num_classes: int, *, checkpoint: str | Path | None, model_args: dict[str, Any]
) -> tuple[nn.Module, Statistics]:
    """Build a frozen teacher in evaluation mode.

    Args:
        name: a model of lightspine, or of timm with or without the tag of its weights.
        num_classes: number of classes that it must tell apart.
        checkpoint: a file of its weights; without it timm's published ones are fetched.
        model_args: further arguments of the model.

    Returns:
        The model, and the (mean, std) by which its images are normalised.

    Raises:
        UsageError: an unknown name, no weights to have, or another number of classes.
        LightspineError: the weights cannot be read or fetched, or are of another model.
    """
    # What is drawn for weights that are then replaced must not change what is drawn for the student.
    with torch.random.fork_rng(devices=[]):
        if checkpoint is None:
            model, config = _published(name, num_classes, model_args)
        else:
            model, config = _from_file(name, checkpoint, model_args)
    _check_classes(name, model.num_classes, num_classes)
    statistics = (
        tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN),
        tuple(config.get("std") or IMAGENET_DEFAULT_STD),
    )
    return model.eval().requires_grad_(False), statistics


def _published(name: str, num_classes: int, model_args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    options = {"pretrained": True} | model_args
    if options["pretrained"] and find_record(name) is None and timm.is_model(name):
        try:
            cfg = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            raise UsageError(f"expected a teacher that timm publishes, got {name!r}: {error}") from error
        if cfg is None or not cfg.has_weights:
            raise UsageError(f"timm publishes no weights for the teacher {name!r}: give a checkpoint")
        if "num_classes" not in options:
            # Before a gigabyte is fetched for nothing.
            _check_classes(name, cfg.num_classes, num_classes)
    try:
        model: Any = create_model(name, **options)
    # The hub's errors for no connection and for no such file are both of this kind.
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise LightspineError(f"cannot fetch the weights of the teacher {name!r}: {reason}") from error
    return model, model.pretrained_cfg


def _from_file(name: str, checkpoint: str | Path, model_args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    file = read_checkpoint(checkpoint)
    saved = read_saved_model(file)
    if saved is not None and saved.name != name:
        raise UsageError(f"expected weights of the teacher {name!r}, but {file.label} is of {saved.name!r}")
    if saved is not None or find_record(name) is not None:
        # The file tells its own number of classes, sizes and preprocessing.
        loaded, saved = load_model(checkpoint, name=name, **model_args)
        return loaded, saved.preprocessing
    options = _count_classes(name, file) | model_args
    model: Any = create_model(name, **options)
    load_checkpoint_file(model, file, drop_head=False)
    return model, model.pretrained_cfg


def _count_classes(name: str, file: CheckpointFile) -> dict[str, Any]:
    """Return the width of the classifier in a file of timm's layout, where it has one."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    classifier = cfg.classifier if cfg is not None else None
    first = classifier[0] if isinstance(classifier, tuple | list) else classifier
    weight = next(iter(file.entries.values())).get(f"{first}.weight")
    return {} if weight is None else {"num_classes": int(weight.shape[0])}


def _check_classes(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise UsageError(
            f"expected a teacher with the {expected} classes of the data, but {name!r} has {found}"
        )
