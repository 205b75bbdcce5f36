"""Fold affine steps into the convolution or linear map beside them.

All sums are done in float64, so that the folded weights are the exact ones rounded once.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

Linear = nn.Conv2d | nn.ConvTranspose2d | nn.Linear

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def affine_of(norm: _BatchNorm) -> tuple[Tensor, Tensor] | None:
    """Return the factor and the summand per channel of a BatchNorm, float64; `None` if it has no statistics.

    A subclass, which may do more than normalise, has neither.
    """
    if type(norm) not in _NORMS or norm.running_mean is None or norm.running_var is None:
        return None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return factor, shift


def scale_output(layer: Linear, factor: Tensor, shift: Tensor | float = 0.0) -> None:
    """Make a layer give `factor * layer(x) + shift`, per output channel; it has a bias afterwards."""
    weight = layer.weight.double()
    if isinstance(layer, nn.ConvTranspose2d):
        # (in, out / groups, kh, kw): an output channel is told by its group and its place in it.
        sides = (layer.groups, -1, *weight.shape[1:])
        scaled = weight.view(sides) * factor.double().view(layer.groups, 1, -1, 1, 1)
        weight = scaled.view(weight.shape)
    else:
        weight = weight * factor.double().view(-1, *[1] * (weight.dim() - 1))
    bias = 0.0 if layer.bias is None else layer.bias.double()
    set_weights(layer, weight, bias * factor.double() + shift)


def absorb_input(layer: nn.Conv2d | nn.Linear, factor: Tensor, shift: Tensor) -> None:
    """Make a linear map or an unpadded pointwise convolution give `layer(factor * x + shift)`."""
    weight = layer.weight.double().flatten(1)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    bias = bias + weight @ shift.double()
    set_weights(layer, (weight * factor.double()).view(layer.weight.shape), bias)


def add_input(layer: nn.Conv2d, factor: Tensor | float = 1.0) -> None:
    """Make a depthwise convolution of stride 1 that keeps the size give `layer(x) + factor * x`."""
    weight = layer.weight.double().clone()
    weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += factor
    set_weights(layer, weight, None if layer.bias is None else layer.bias.double())


def set_weights(layer: Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Replace weight and bias of a layer by values, in the layer's dtype and memory format."""
    like = layer.weight
    # In place the new values would take over the memory format; a parameter anew says what it is.
    layer.weight = nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(like.dtype), requires_grad=False)


def fold_sequence(module: nn.Sequential) -> nn.Sequential:
    """Fold each BatchNorm into the layer right before it and take it out; the others keep their names."""
    before: nn.Module | None = None
    for name, layer in list(module.named_children()):
        if isinstance(layer, _BatchNorm) and isinstance(before, Linear):
            affine = affine_of(layer)
            if affine is not None:
                scale_output(before, *affine)
                delattr(module, name)
                continue
        before = layer
    return module
