"""Fine-tuning: stages that stay as they are, smaller learning rates towards the image, and what is new.

What a checkpoint needs to fit happens when it is loaded (`lightspine.create_model(name, checkpoint=PATH,
num_classes=N)`): a classifier of another size is left out, a first convolution is adapted, a position table
is resized. Vim's stride-8 models start from stride-16 weights in this way (`vim_tiny_plus` from `vim_tiny`),
the other families have nothing that depends on the size of the images and start at 384 or 512 px as they are.
"""

from typing import Any

import torch.nn as nn
from timm.models import group_parameters

from lightspine.errors import UsageError
from lightspine.models.loading import LoadReport


def freeze_stages(model: nn.Module, stages: int) -> list[str]:
    """Stop the training of a model's stem and of its first stages.

    Their parameters need no gradient any more. In training their norms would still follow the images and
    their drop path would still drop: `hold_frozen` keeps them in evaluation mode.

    Args:
        model: a model of lightspine or timm.
        stages: 0 freezes the stem alone, n also the first n stages; in models without stages (Vim, a ViT) the
            blocks count as such.

    Returns:
        The names of the frozen modules, for `hold_frozen`.

    Raises:
        UsageError: the model does not have as many stages, does not tell them apart, or was made by
            `lightspine.create_model` without weights that are worth keeping.
    """
    _check_weights(model)
    layers = layer_indices(model, coarse=True)
    # The last layer is the classifier, with the norms before it: frozen too, nothing would be left to train.
    most = max(layers.values()) - 1
    if not 0 <= stages <= most:
        raise UsageError(f"expected from 0 to {most} frozen stages of {_model_name(model)}, got {stages}")
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
    """Put frozen modules into evaluation mode; to be called after every `model.train()`.

    Args:
        model: the model, or a copy of it.
        names: what `freeze_stages` returned.
    """
    for name in names:
        model.get_submodule(name).eval()


def layer_indices(model: nn.Module, *, coarse: bool) -> dict[str, int]:
    """Return the layer of every parameter, counted from the stem, which is 0.

    Args:
        model: a model of lightspine or timm; its `group_matcher` assigns parameters to layers.
        coarse: count stages instead of blocks; the blocks of a model without stages count as stages.

    Raises:
        UsageError: the model has no `group_matcher`.
    """
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        raise UsageError(
            f"{_model_name(model)} does not assign its parameters to layers: it has no group_matcher"
        )
    layers: dict[str, int] = group_parameters(model, matcher(coarse=coarse), reverse=True)
    return layers


def describe_start(model: nn.Module) -> str:
    """Return in one line what a model starts from: tensors loaded, tensors that are new, parameters frozen.

    Args:
        model: a model that `lightspine.create_model` made.
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


def _check_weights(model: nn.Module) -> None:
    init_args: dict[str, Any] | None = getattr(model, "init_args", None)
    if init_args is None or hasattr(model, "load_report") or init_args["kwargs"].get("pretrained"):
        return
    raise UsageError(f"frozen stages of {init_args['name']} would keep random weights: give a checkpoint")


def _model_name(model: nn.Module) -> str:
    init_args: dict[str, Any] = getattr(model, "init_args", {"name": type(model).__name__})
    return str(init_args["name"])
