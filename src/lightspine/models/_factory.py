"""`create_model`: our models first, every other name through timm."""

from pathlib import Path
from typing import Any, cast

import timm
import torch.nn as nn

from lightspine.models._checkpoints import load_checkpoint, load_checkpoint_file
from lightspine.models._reading import Weights, read_checkpoint
from lightspine.models._registry import find_record, unknown_model

_FEATURE_OPTIONS = ("features_only", "out_indices", "feature_cls")


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

    Examples:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1", num_classes=10).eval()
        >>> model(torch.zeros(1, 3, 97, 161)).shape
        torch.Size([1, 10])
    """
    if find_record(name) is None and not timm.is_model(name):
        raise unknown_model(name)
    if checkpoint is not None and kwargs.get("features_only"):
        model = _create_features(name, checkpoint, weights, kwargs)
    else:
        model = _build(name, kwargs)
        if checkpoint is not None:
            drop_head = True if "num_classes" in kwargs else None
            model.load_report = load_checkpoint(model, checkpoint, weights=weights, drop_head=drop_head)
    # What `save_checkpoint` writes, so that a file says how to build its model.
    model.creation = {"name": name, "kwargs": kwargs}
    return cast(nn.Module, model)


def _build(name: str, kwargs: dict[str, Any]) -> Any:
    record = find_record(name)
    return record.create(**kwargs) if record else timm.create_model(name, **kwargs)


def _create_features(
    name: str, checkpoint: str | Path | dict[str, Any], weights: Weights, kwargs: dict[str, Any]
) -> Any:
    """Load the whole model first: the wrapper of `features_only` holds only what its maps need."""
    file = read_checkpoint(checkpoint)
    whole = _build(name, {key: value for key, value in kwargs.items() if key not in _FEATURE_OPTIONS})
    report = load_checkpoint_file(whole, file, weights=weights, drop_head=True)
    wrapper = _build(name, kwargs)
    inner = getattr(wrapper, "model", None)
    if isinstance(inner, nn.Module):
        tensors = whole.state_dict()
        inner.load_state_dict({key: tensors[key] for key in inner.state_dict()})
    else:
        # timm's other wrappers rename the modules: timm itself knows how to fill them.
        overlay = {"state_dict": dict(file.entries[report.entry])}
        wrapper = _build(name, kwargs | {"pretrained": True, "pretrained_cfg_overlay": overlay})
    wrapper.load_report = report
    return wrapper
