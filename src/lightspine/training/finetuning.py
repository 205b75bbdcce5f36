"""Fine-tuning: frozen stages, layer indices for layer-wise decay, and a summary of the loaded weights.

`lightspine.create_model(name, checkpoint=PATH, num_classes=N)` adapts a checkpoint to the model: it drops a
classifier of another size, adapts the first convolution and resizes position embeddings. Vim's stride-8
models can thus start from stride-16 weights (`vim_tiny_plus` from `vim_tiny`). In the other families no
parameter depends on the image size, so they load unchanged at 384 or 512 px.
"""

from typing import Any

import torch.nn as nn
from timm.models import group_parameters

from lightspine.errors import UsageError
from lightspine.models.loading import LoadReport, frozen_without_weights


def freeze_stages(model: nn.Module, stages: int) -> list[str]:
    """Freeze the stem and the first stages of a model.

    Sets `requires_grad=False` on their parameters and puts them in evaluation mode. `model.train()` would
    put their BatchNorm and drop path back in training mode: call `hold_frozen` after it.

    Args:
        model: a model of lightspine or timm.
        stages: number of stages to freeze after the stem; 0 freezes only the stem. In models without stages
            (Vim, ViT) each block counts as a stage.

    Returns:
        The names of the frozen modules, for `hold_frozen`.

    Raises:
        UsageError: the model has fewer stages, no `group_matcher`, or no pretrained weights (if created by
            `lightspine.create_model`).
    """
    _check_pretrained(model)
    layers = layer_indices(model, coarse=True)
    # The last layer has the final norm and the classifier, which must stay trainable.
    most = max(layers.values()) - 1
    if not 0 <= stages <= most:
        raise UsageError(f"expected 0 to {most} frozen stages of {_model_name(model)}, got {stages}")
    frozen = {name for name, layer in layers.items() if layer <= stages}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    names: list[str] = []
    for name, module in model.named_modules():
        inside = [f"{name}.{own}" for own, _ in module.named_parameters()] if name else []
        covered = any(name.startswith(f"{above}.") for above in names)
        if inside and not covered and frozen.issuperset(inside):
            names.append(name)
    hold_frozen(model, names)
    return names


def hold_frozen(model: nn.Module, names: list[str]) -> None:
    """Put frozen modules in evaluation mode; call it after every `model.train()`.

    Args:
        model: the model, or a copy of it.
        names: the return value of `freeze_stages`.
    """
    for name in names:
        model.get_submodule(name).eval()


def layer_indices(model: nn.Module, *, coarse: bool) -> dict[str, int]:
    """Return the layer index of every parameter, from 0 for the stem.

    Args:
        model: a model of lightspine or timm; its `group_matcher` assigns parameters to layers.
        coarse: count stages instead of blocks.

    Raises:
        UsageError: the model has no `group_matcher`.
    """
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        raise UsageError(f"expected a model with a group_matcher, got {_model_name(model)}")
    layers: dict[str, int] = group_parameters(model, matcher(coarse=coarse), reverse=True)
    return layers


def describe_start(model: nn.Module) -> str:
    """Return a one-line summary of the loaded, new, resized and frozen parameters of a model.

    Args:
        model: a model from `lightspine.create_model`.
    """
    report: LoadReport | None = getattr(model, "load_report", None)
    if report is None:
        parts = ["random weights"]
    else:
        parts = [f"{len(report.loaded)} tensors of {report.source}"]
        if report.missing:
            parts.append(f"{len(report.missing)} new ones ({', '.join(report.missing)})")
        if resized := [name for name, change in report.converted.items() if change == "computed"]:
            parts.append(f"{', '.join(resized)} resized to fit")
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if frozen:
        parts.append(f"{frozen:,} of {total:,} parameters frozen")
    return f"{_model_name(model)} starts from " + ", ".join(parts)


def _check_pretrained(model: nn.Module) -> None:
    init_args: dict[str, Any] | None = getattr(model, "init_args", None)
    if init_args is None or hasattr(model, "load_report") or init_args.get("pretrained"):
        return
    raise frozen_without_weights(str(init_args["name"]))


def _model_name(model: nn.Module) -> str:
    init_args: dict[str, Any] = getattr(model, "init_args", {"name": type(model).__name__})
    return str(init_args["name"])
