"""Device checks and channels-last conversion for `optimize`."""

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.ops.memory_format import channels_last
from lightspine.optimize.folding import FoldableLayer


def on_cuda(tensor: Tensor) -> bool:
    """Return whether a tensor is on a CUDA device, where products have other fused forms than on a CPU."""
    return tensor.is_cuda


def convolve_channels_last(model: nn.Module) -> None:
    """Store the weights of all 2d convolutions on a CUDA device in `torch.channels_last` format.

    cuDNN then computes, and returns maps, in that format, which is the one of the tensor cores. A weight in
    another format would be copied at every call.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 4 or not on_cuda(weight):
            continue
        converted = weight.detach().contiguous(memory_format=torch.channels_last)
        layer: FoldableLayer = module  # type: ignore[assignment]
        layer.weight = nn.Parameter(converted, requires_grad=False)


class ToChannelsLast(nn.Module):
    """Converts a map (B, C, H, W) to `torch.channels_last` format."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map in that format."""
        return channels_last(x)
