"""Multiply-adds (MACs) of a forward pass, counted from tensor shapes.

The convention is that of the papers, which call them FLOPs:

- one multiply-add of a convolution or of a matrix product (linear layers, attention) counts 1;
- a selective scan over `B` sequences of length `L`, `D` channels and `N` states counts `9 B L D N`,
  plus `B L D` each for a skip connection and a gate (`lightspine.ops.flops`);
- elementwise operations, norms, pooling and biases count 0.

Some published numbers include norms and pooling and are up to 2 % larger.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lightspine.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-adds of one image by kind; see the module for the convention.

    Attributes:
        conv: of the convolutions.
        matmul: of linear layers, attention and other matrix products.
        scan: of the selective scans, see `lightspine.ops.flops.scan_flops`.
    """

    conv: int
    matmul: int
    scan: int

    @property
    def total(self) -> int:
        """The sum of the three kinds."""
        return self.conv + self.matmul + self.scan


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> Macs:
    """Count the multiply-adds of a forward pass in eval mode on the meta device; the model is not changed.

    Args:
        model: any model that takes a `(1, C, H, W)` tensor.
        input_size: `(C, H, W)` of one image, in pixels.

    Raises:
        UsageError: `input_size` is not three positive numbers.
    """
    if len(input_size) != 3 or min(input_size) < 1:
        raise UsageError(
            f"input_size must be (channels, height, width), all positive, got {tuple(input_size)}"
        )
    # The meta device computes nothing, so a large model takes neither time nor memory.
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: tensor.detach().to("meta") for name, tensor in named.items()}
    training = {module: module.training for module in model.modules()}
    model.eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            functional_call(model, tensors, (torch.empty((1, *input_size), device="meta"),))
    finally:
        for module, mode in training.items():
            module.training = mode
    return _by_kind(counter)


def _by_kind(counter: FlopCounterMode) -> Macs:
    conv = matmul = scan = 0
    # PyTorch counts two operations per multiply-add, as our operators do (`lightspine.ops.flops`).
    for operator, flops in counter.get_flop_counts().get("Global", {}).items():
        name = str(operator)
        if name.startswith("lightspine"):
            scan += flops // 2
        elif "convolution" in name:
            conv += flops // 2
        else:
            matmul += flops // 2
    return Macs(conv=conv, matmul=matmul, scan=scan)
