"""Fold affine operations into the weights of the neighbouring convolution or linear layer.

Folded weights are computed in float64 and rounded once.
"""

from typing import Any, TypeVar

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor

Model = TypeVar("Model", bound=nn.Module)
FoldableLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear

# Exact types: a subclass may compute something else, such as a convolution with standardized weights.
FOLDABLE_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.Linear,
    Conv2dSame,
)
# Exact types here too. timm's BatchNormAct2d also has a dropout and an activation.
BATCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    BatchNormAct2d,
)


def batch_norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift per channel of a BatchNorm in evaluation mode, in float64.

    `None` for another module, a subclass of BatchNorm, or a BatchNorm without running statistics.
    """
    batch_norm: Any = norm
    if type(norm) not in BATCH_NORMS or batch_norm.running_mean is None or batch_norm.running_var is None:
        return None
    scale = (batch_norm.running_var.double() + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        scale = scale * batch_norm.weight.double()
    shift = -batch_norm.running_mean.double() * scale
    if batch_norm.bias is not None:
        shift = shift + batch_norm.bias.double()
    return scale, shift


def scale_output(layer: FoldableLayer, scale: Tensor, shift: Tensor | float = 0.0) -> None:
    """Change a layer's weights so that it computes `scale * layer(x) + shift`, per output channel.

    The layer has a bias afterwards.
    """
    weight = layer.weight.double()
    if isinstance(layer, nn.ConvTranspose2d):
        # Its weight is (in, out / groups, kh, kw): the output channel is the group and the index in it.
        grouped = weight.view(layer.groups, -1, *weight.shape[1:])
        weight = (grouped * scale.double().view(layer.groups, 1, -1, 1, 1)).view(weight.shape)
    else:
        weight = weight * scale.double().view(-1, *[1] * (weight.dim() - 1))
    bias = 0.0 if layer.bias is None else layer.bias.double()
    set_weights(layer, weight, bias * scale.double() + shift)


def scale_input(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Change a linear layer's or 1x1 convolution's weights so that it computes `layer(scale * x + shift)`."""
    weight = layer.weight.double().flatten(1)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    bias = bias + weight @ shift.double()
    set_weights(layer, (weight * scale.double()).view(layer.weight.shape), bias)


def add_identity(layer: nn.Conv2d, scale: Tensor | float = 1.0) -> None:
    """Change the weights of a depthwise convolution so that it computes `layer(x) + scale * x`.

    The convolution has stride 1 and keeps the size of the map.
    """
    weight = layer.weight.double().clone()
    weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += scale
    set_weights(layer, weight, None if layer.bias is None else layer.bias.double())


def set_weights(layer: FoldableLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Replace weight and bias of a layer, keeping its dtype and the memory format of its weight."""
    like = layer.weight
    # New parameters: copying into the old ones would keep an expanded or transposed layout of the values.
    layer.weight = nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(like.dtype), requires_grad=False)


def merge_distillation_heads(model: Model) -> Model:
    """Replace the two linear classifiers of a distilled model by one, as their mean is the model's output."""
    distilled: Any = model
    if distilled.distilled and distilled.num_classes:
        head, other = distilled.head, distilled.head_dist
        weight = (head.weight.double() + other.weight.double()) / 2
        set_weights(head, weight, (head.bias.double() + other.bias.double()) / 2)
        distilled.head_dist = nn.Identity()
        distilled.distilled = False
    return model
