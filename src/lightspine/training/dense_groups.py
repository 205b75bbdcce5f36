"""Parameter groups of detectors and segmenters: what is decayed, and how fast each layer learns."""

from collections.abc import Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn

from lightspine.dense import DenseNetwork, feature_backbone
from lightspine.errors import UsageError


def dense_parameter_groups(
    network: DenseNetwork,
    *,
    lr: float,
    weight_decay: float,
    undecayed: Sequence[str] | None = None,
    layer_decay: float | None = None,
    layer_decay_blocks: bool = True,
) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups.

    Args:
        network: the detector or segmenter; frozen parameters are left out.
        lr: rate of the head.
        weight_decay: of the decayed parameters.
        undecayed: parts of the names of parameters that are not decayed, as the published dense tasks have
            it; an empty list decays all. Without it 1-d parameters are not decayed, nor those whose name ends
            in `.bias` or that the backbone's `no_weight_decay()` names.
        layer_decay: factor from one layer to the one before it; the head has 1, the last block the factor,
            the stem its power. Without it all learn at `lr`.
        layer_decay_blocks: False lets the blocks learn at `lr` and only the stem and a position table slower.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.

    Raises:
        UsageError: a `layer_decay` out of its range, or for a model that does not tell its layers apart.
    """
    spared = _spared(network) if undecayed is None else set()
    scales = {} if layer_decay is None else _scales(network, layer_decay, layer_decay_blocks)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if undecayed is None:
            decayed = parameter.ndim > 1 and not name.endswith(".bias") and name not in spared
        else:
            decayed = not any(part in name for part in undecayed)
        rate, decay = lr * scales.get(name, 1.0), weight_decay if decayed else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _inner(network: DenseNetwork) -> tuple[str, nn.Module]:
    """Return the model that the maps come from, without the wrapper of `features_only`, and its prefix."""
    wrapper: nn.Module = feature_backbone(network).model
    inner = getattr(wrapper, "model", wrapper)
    name = next(name for name, module in network.named_modules() if module is inner)
    return f"{name}.", inner


def _spared(network: DenseNetwork) -> set[str]:
    prefix, inner = _inner(network)
    no_weight_decay = getattr(inner, "no_weight_decay", None)
    return {prefix + name for name in no_weight_decay()} if callable(no_weight_decay) else set()


def _scales(network: DenseNetwork, layer_decay: float, blocks: bool) -> dict[str, float]:
    """Return name -> factor of the rate, for the parameters of the model."""
    if not 0 < layer_decay <= 1:
        raise UsageError(f"expected a layer_decay above 0 and up to 1, got {layer_decay}")
    prefix, inner = _inner(network)
    matcher: Any = getattr(inner, "group_matcher", None)
    if not callable(matcher):
        raise UsageError(
            f"{type(inner).__name__} does not tell its layers apart, as layer_decay needs: it has no "
            "group_matcher"
        )
    layers: dict[str, int] = group_parameters(inner, matcher(coarse=False), reverse=True)
    head = max(layers.values()) + 1
    return {
        prefix + name: layer_decay ** (head - layer) for name, layer in layers.items() if blocks or layer == 0
    }
