"""`create_model`: our models first, every other name through timm."""

from pathlib import Path
from typing import Any, cast

import timm
import torch.nn as nn

from lightspine.models._checkpoints import load_checkpoint
from lightspine.models._reading import Weights
from lightspine.models._registry import find_record, unknown_model


def create_model(
    name: str,
    *,
    checkpoint: str | Path | dict[str, Any] | None = None,
    weights: Weights = "auto",
    **kwargs: Any,
) -> nn.Module:
    """Create a model by name, with the weights of a checkpoint file if one is given.

    The five families of lightspine come first; any other name is timm's, with timm's arguments.

    Args:
        name: such as `vmamba_tiny`; `lightspine.list_models()` lists ours.
        checkpoint: an official file, timm's or ours, loaded strictly (`lightspine.load_checkpoint`). With
            `num_classes` given, a head of another size in the file is left out; with `in_chans`, the first
            convolution is adapted as timm does.
        weights: which entry of the file: "model", "ema", or "auto" for the one whose score is published.
        **kwargs: the model's own arguments (`num_classes`, `in_chans`, `drop_path_rate`, `features_only`...).

    Returns:
        The model, in training mode as PyTorch makes it. `model.load_report` tells what became of the
        checkpoint's tensors.

    Raises:
        UsageError: unknown name (the closest ones are given), no such file or entry.
        LightspineError: the checkpoint cannot be read or is of another family or variant.

    Example:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1", num_classes=10).eval()
        >>> model(torch.zeros(1, 3, 97, 161)).shape
        torch.Size([1, 10])
    """
    record = find_record(name)
    if record is None and not timm.is_model(name):
        raise unknown_model(name)
    model: Any = record.create(**kwargs) if record else timm.create_model(name, **kwargs)
    # What `save_checkpoint` writes, so that a file says how to build its model.
    model.creation = {"name": name, "kwargs": kwargs}
    if checkpoint is not None:
        backbone = _unwrap(model)
        drop_head = True if "num_classes" in kwargs or kwargs.get("features_only") else None
        model.load_report = load_checkpoint(backbone, checkpoint, weights=weights, drop_head=drop_head)
    return cast(nn.Module, model)


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside the wrapper that `features_only=True` gives."""
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model
