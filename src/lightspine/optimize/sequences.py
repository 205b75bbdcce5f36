"""Layers in a row, packed for inference."""

from collections.abc import Iterator

import torch.nn as nn
from timm.layers import Sigmoid as TimmSigmoid
from timm.layers import SqueezeExcite
from torch import Tensor

from lightspine.optimize.packed import PackedConv2d, can_fuse
from lightspine.optimize.pointwise import PackedPointwise, is_pointwise


class PackedSqueezeExcite(nn.Module):
    """timm's `SqueezeExcite` as matrix products."""

    def __init__(self, module: SqueezeExcite):
        super().__init__()
        self.fc1 = PackedPointwise(module.fc1, module.act)
        self.fc2 = PackedPointwise(module.fc2, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of a map (B, C, H, W)."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)))


def pack_sequence(*layers: nn.Module) -> nn.Sequential:
    """Return layers in one row, each convolution packed together with the activation behind it."""
    row = [layer for module in layers for layer in _flatten(module)]
    packed: list[nn.Module] = []
    while row:
        layer = row.pop(0)
        if isinstance(layer, nn.Conv2d):
            activation = row.pop(0) if row and can_fuse(row[0]) else None
            kind = PackedPointwise if is_pointwise(layer) else PackedConv2d
            packed.append(kind(layer, activation))
        elif isinstance(layer, SqueezeExcite) and _is_plain(layer):
            packed.append(PackedSqueezeExcite(layer))
        else:
            packed.append(layer)
    return nn.Sequential(*packed).eval()


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for layer in module:
            yield from _flatten(layer)
    else:
        yield module


def _is_plain(module: SqueezeExcite) -> bool:
    return (
        type(module) is SqueezeExcite
        and not module.add_maxpool
        and isinstance(module.bn, nn.Identity)
        and can_fuse(module.act)
        and isinstance(module.gate, nn.Sigmoid | TimmSigmoid)
    )
