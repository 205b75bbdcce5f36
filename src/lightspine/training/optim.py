"""Optimizer construction: weight-decay groups and layer-wise learning-rate decay."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightspine.dense import DenseNetwork, feature_backbone
from lightspine.errors import UsageError
from lightspine.training.finetuning import layer_indices

OptimizerName = Literal["adamw", "sgd", "lamb"]
ParameterGroups = list[dict[str, Any]]


def create_optimizer(
    model: nn.Module,
    name: OptimizerName,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Create the optimizer of a classifier with timm.

    As in all five official repositories, there is no weight decay on 1-d parameters, parameters whose name
    ends in `.bias` and the parameters listed by the model's `no_weight_decay()`.

    Args:
        model: the model; frozen parameters are excluded.
        name: timm's name of the optimizer. All use PyTorch's defaults: AdamW has betas
            (0.9, 0.999) and eps 1e-8.
        lr: peak learning rate; with `layer_decay` that of the classifier.
        weight_decay: weight decay of the decayed parameters.
        layer_decay: factor between the learning rates of neighboring layers; see `layer_lr_scales`.
        fused: use the fused kernel of AdamW or SGD, which updates all weights in one pass. LAMB has none. On
            a CPU the unfused step takes half as long as a forward pass.

    Raises:
        UsageError: `layer_decay` is out of range.
    """
    if layer_decay is None:
        # Pass the model and not its parameters, so that timm calls its no_weight_decay().
        options = _fused_option(name, fused)
        return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay, **options)
    groups = layer_decay_groups(model, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
    return optimizer_from_groups(groups, name, lr=lr, fused=fused)


def optimizer_from_groups(
    groups: ParameterGroups, name: OptimizerName, *, lr: float, fused: bool = False
) -> torch.optim.Optimizer:
    """Create an optimizer with timm from parameter groups that have their own `lr` and `weight_decay`."""
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **_fused_option(name, fused))


def lr_scheduler_config(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> dict[str, LambdaLR | str]:
    """Return Lightning's configuration of a scheduler that updates the learning rate every step.

    Args:
        optimizer: the optimizer; all groups are scaled by the same factor.
        factor: maps an optimizer step, from 0, to the factor of the learning rates.
    """
    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}


def layer_lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the learning-rate factor of every parameter under layer-wise learning-rate decay.

    Args:
        model: a model of lightspine or timm; its `group_matcher` assigns parameters to layers.
        layer_decay: factor from a layer to the one before it, above 0 and at most 1. A layer is a block
            together with the downsampling before it, or the stem. The classifier has factor 1.

    Returns:
        Parameter name -> layer_decay ** (number of layers between the parameter and the classifier).

    Raises:
        UsageError: `layer_decay` is out of range, or the model has no `group_matcher`.
    """
    _check_layer_decay(layer_decay)
    layers = layer_indices(model, coarse=False)
    last = max(layers.values())
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def layer_decay_groups(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float
) -> ParameterGroups:
    """Return the parameter groups of a classifier with layer-wise learning-rate decay.

    The learning rate of a group is its `lr`. timm's `lr_scale` is not used, because only timm's schedulers
    read it.

    Args:
        model: see `layer_lr_scales`; frozen parameters are excluded.
        lr: learning rate of the classifier.
        weight_decay: weight decay of the decayed parameters; see `create_optimizer` for the rule.
        layer_decay: see `layer_lr_scales`.

    Raises:
        UsageError: see `layer_lr_scales`.
    """
    scales = layer_lr_scales(model, layer_decay)
    no_decay = _no_decay_by_shape(model, _no_weight_decay_names(model))
    return _group_parameters(model, no_decay, scales, lr=lr, weight_decay=weight_decay)


def dense_parameter_groups(
    network: DenseNetwork,
    *,
    lr: float,
    weight_decay: float,
    undecayed: Sequence[str] | None = None,
    layer_decay: float | None = None,
    layer_decay_blocks: bool = True,
) -> ParameterGroups:
    """Return the parameter groups of a detector or segmenter.

    Args:
        network: the detector or segmenter; frozen parameters are excluded.
        lr: learning rate of the head.
        weight_decay: weight decay of the decayed parameters.
        undecayed: substrings of the names of parameters without weight decay, as the published dense recipes
            define them; an empty list decays all parameters. By default the rule of `create_optimizer`
            applies, with the backbone's `no_weight_decay()`.
        layer_decay: factor from a layer to the one before it. The head has factor 1, the last block
            `layer_decay`, the stem the highest power of it. By default all layers have learning rate `lr`.
        layer_decay_blocks: if False, decay only the learning rate of the stem and the position embedding.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.

    Raises:
        UsageError: `layer_decay` is out of range, or the backbone has no `group_matcher`.
    """
    prefix, backbone = _dense_backbone(network)
    if undecayed is None:
        no_decay = _no_decay_by_shape(network, {prefix + name for name in _no_weight_decay_names(backbone)})
    else:
        no_decay = {name for name, _ in network.named_parameters() if any(part in name for part in undecayed)}
    scales: dict[str, float] = {}
    if layer_decay is not None:
        _check_layer_decay(layer_decay)
        layers = layer_indices(backbone, coarse=False)
        head = max(layers.values()) + 1
        scales = {
            prefix + name: layer_decay ** (head - layer)
            for name, layer in layers.items()
            if layer_decay_blocks or layer == 0
        }
    return _group_parameters(network, no_decay, scales, lr=lr, weight_decay=weight_decay)


def _group_parameters(
    model: nn.Module, no_decay: set[str], scales: dict[str, float], *, lr: float, weight_decay: float
) -> ParameterGroups:
    """Group trainable parameters by (learning rate, weight decay), in the order of their first parameters."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * scales.get(name, 1.0)
        decay = 0.0 if name in no_decay else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _no_decay_by_shape(model: nn.Module, listed: set[str]) -> set[str]:
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith(".bias") or name in listed
    }


def _no_weight_decay_names(model: nn.Module) -> set[str]:
    no_weight_decay = getattr(model, "no_weight_decay", None)
    return set(no_weight_decay()) if callable(no_weight_decay) else set()


def _dense_backbone(network: DenseNetwork) -> tuple[str, nn.Module]:
    """Return the backbone without timm's `features_only` wrapper, and the prefix of its parameter names."""
    wrapper: nn.Module = feature_backbone(network).model
    backbone = getattr(wrapper, "model", wrapper)
    name = next(name for name, module in network.named_modules() if module is backbone)
    return f"{name}.", backbone


def _check_layer_decay(layer_decay: float) -> None:
    if not 0 < layer_decay <= 1:
        raise UsageError(f"expected a layer_decay above 0 and up to 1, got {layer_decay}")


def _fused_option(name: OptimizerName, fused: bool) -> dict[str, Any]:
    return {"fused": True} if fused and name in ("adamw", "sgd") else {}
