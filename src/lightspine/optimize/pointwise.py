"""1x1 convolutions and linear maps as packed matrix products that also add or multiply by another tensor.

A 1x1 convolution of a map whose channels lie innermost is a matrix product. As such it is spared what PyTorch
does for a convolution: to lay the weights out anew at each call and, for a single image on a single thread,
to copy the map. A sum or a product with another tensor is done while the result is still in registers.
"""

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.optimize.packed import PackedLinear, _Packed


def is_pointwise(conv: nn.Module) -> bool:
    """Return whether a module is a 1x1 convolution without groups, stride or padding."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == 1
    )


class PackedPointwise(_Packed):
    """A 1x1 convolution, and an activation behind it or a map to add, for inference on a CPU.

    Fastest for maps with channels innermost (`torch.channels_last`), which its result has too. When it is the
    plain convolution, `PackedLinear` says.

    Args:
        conv: a convolution of kernel 1 without groups, stride or padding.
        activation: as in `PackedLinear`.

    Raises:
        UsageError: another kind of convolution, or of activation.
    """

    _made_anew = ("_bias", "_packed", "_matrix")

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None = None):
        if not is_pointwise(conv):
            raise UsageError(f"expected a 1x1 convolution without groups, stride or padding, got {conv}")
        super().__init__(conv, activation)

    def _start(self) -> None:
        super()._start()
        self._packed: Tensor | None = None
        self._matrix = self.weight.detach().flatten(1)
        if self.can_pack:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._matrix)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, H, W) to `activation(conv(x))`, or to `activation(conv(x)) + add`."""
        if not self._takes(x):
            y = self.activation(F.conv2d(x, self.weight, self.bias))
            return y if add is None else y + add
        tokens = x.permute(0, 2, 3, 1)
        if x.numel() < self._few_numbers:
            y = self.activation(F.linear(tokens, self._matrix, self._bias)).permute(0, 3, 1, 2)
            return y if add is None else y + add
        if add is None or self.attribute != "none":
            y = torch.ops.mkldnn._linear_pointwise.default(
                tokens, self._packed, self._bias, self.attribute, [], self.variant
            ).permute(0, 3, 1, 2)
            return y if add is None else y + add
        # Named, since PyTorch, which tries "default" first, would print the tensors into an error it drops.
        y = torch.ops.mkldnn._linear_pointwise.binary(
            tokens, add.permute(0, 2, 3, 1), self._packed, self._bias, "add"
        )
        return y.permute(0, 3, 1, 2)


class CombiningLinear(PackedLinear):
    """A linear map whose result is added to, or multiplied by, another tensor; see `PackedLinear`.

    Args:
        linear: gives weight and bias.
        operation: "add" or "mul".
    """

    def __init__(self, linear: nn.Linear, operation: Literal["add", "mul"]):
        super().__init__(linear)
        self.operation = operation

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        """Map (..., in_features) and another tensor (..., out_features) to (..., out_features)."""
        if self._takes(x) and x.numel() >= self._few_numbers:
            return torch.ops.mkldnn._linear_pointwise.binary(
                x, other, self._packed, self._bias, self.operation
            )
        y = F.linear(x, self.weight, self.bias)
        return y + other if self.operation == "add" else y * other
