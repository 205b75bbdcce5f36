"""Linear maps and convolutions whose weights are laid out once for oneDNN, their activation fused into them.

PyTorch hands float32 matrix products to MKL, which on AMD processors reaches about 85 % of what oneDNN does,
and lays the weights of a convolution, and those of a bfloat16 product, out anew at every call. oneDNN also
applies an activation while the result is still in registers. The operators are those that `torch.compile`
emits for a frozen model; they belong to no public interface, so `packing_available` says whether they are
there.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError

# What oneDNN calls an activation, and its variant.
_ACTIVATIONS = {
    nn.Identity: ("none", ""),
    nn.ReLU: ("relu", ""),
    nn.SiLU: ("swish", ""),
    nn.Sigmoid: ("sigmoid", ""),
    nn.GELU: ("gelu", "none"),
}
_OPERATORS = (
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_is_mkldnn_bf16_supported",
)
# Input sizes for which a convolution remembers its weights.
_SIZES_KEPT = 4
# Products of fewer multiplications in float32 take less time than a call of oneDNN.
_SMALL_PRODUCT = 2**18


def packing_available() -> tuple[bool, str]:
    """Return whether weights can be laid out for oneDNN here, and of what or why not."""
    if not torch.backends.mkldnn.is_available():
        return False, "this PyTorch is built without oneDNN"
    for name in _OPERATORS:
        if not hasattr(torch.ops.mkldnn, name):
            return False, f"this PyTorch has no operator mkldnn::{name}"
    return True, "CPU tensors in float32, and in bfloat16 where the processor has it"


def can_fuse(activation: nn.Module) -> bool:
    """Return whether `PackedLinear` and `PackedConv2d` take an activation."""
    if isinstance(activation, nn.GELU):
        return type(activation) is nn.GELU and activation.approximate == "none"
    return type(activation) in _ACTIVATIONS


class _Packed(nn.Module):
    """What both have in common: when the packed weights are used, and that they follow the plain ones."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    can_pack: bool
    _made_anew: tuple[str, ...] = ("_bias",)

    def __init__(self, layer: nn.Linear | nn.Conv2d, activation: nn.Module | None):
        super().__init__()
        self.activation = nn.Identity() if activation is None else activation
        if not can_fuse(self.activation):
            names = ", ".join(kind.__name__ for kind in _ACTIVATIONS)
            raise UsageError(f"expected an activation of {names}, got {self.activation}")
        self.attribute, self.variant = _ACTIVATIONS[type(self.activation)]
        source: Any = layer
        self.weight, self.bias = source.weight, source.bias
        self._start()

    def _start(self) -> None:
        """Forget packed weights and see whether the present ones can be packed."""
        weight = self.weight
        # Plain attributes: a module looks its parameters up several times as slowly.
        self._dtype = weight.dtype
        self._bias = None if self.bias is None else self.bias.detach()
        self.can_pack = weight.device.type == "cpu" and packing_available()[0]
        if self.can_pack and weight.dtype == torch.bfloat16:
            self.can_pack = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        elif weight.dtype != torch.float32:
            self.can_pack = False
        self._few_numbers = _SMALL_PRODUCT // weight.shape[0] if weight.dtype == torch.float32 else 0

    def _takes(self, x: Any) -> bool:
        """Return whether a call is an ordinary one, of a tensor that the packed weights serve."""
        # Compilers, tracers and exporters write down the plain layer: a packed weight has no place in a file.
        # They come first: the stand-in of a tracer cannot be asked for its dtype.
        tracing = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
        return (
            self.can_pack
            and not tracing
            and not torch.compiler.is_compiling()
            and x.is_cpu
            and x.dtype == self._dtype
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled("cpu")
        )

    def __getstate__(self) -> dict[str, Any]:
        # Whatever `_start` makes: a packed tensor can neither be copied nor pickled.
        return {**self.__dict__, **dict.fromkeys(self._made_anew)}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._start()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._start()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def extra_repr(self) -> str:
        """Say sizes, and whether the weights can be packed."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, packed={self.can_pack}"


class PackedLinear(_Packed):
    """A linear map and an activation behind it, for inference on a CPU.

    Anywhere else (another device or dtype, autocast, while gradients are recorded, in an export or a trace)
    it is `activation(linear(x))`, of the same weights. So they lie in memory twice. The packed ones follow
    `to`, `load_state_dict`, copies and pickles; a change of `weight` in place they do not see.

    Args:
        linear: gives weight and bias.
        activation: `nn.Identity`, `nn.ReLU`, `nn.SiLU`, `nn.Sigmoid` or exact `nn.GELU`; `None` for none.

    Raises:
        UsageError: another activation.
    """

    _made_anew = ("_bias", "_packed")

    def __init__(self, linear: nn.Linear, activation: nn.Module | None = None):
        super().__init__(linear, activation)

    def _start(self) -> None:
        super()._start()
        self._packed: Tensor | None = None
        if self.can_pack:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not self._takes(x) or x.numel() < self._few_numbers:
            return self.activation(F.linear(x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, self._bias, self.attribute, [], self.variant
        )


class PackedConv2d(_Packed):
    """A convolution and an activation behind it, for inference on a CPU; its result is channels-last.

    As `PackedLinear`. Which layout of the weights is fast depends on the size of the input, so they are
    packed at the first call of each size, which takes as long as every call of a plain convolution, and kept
    for the last four sizes.

    Args:
        conv: gives weight, bias, stride, padding, dilation and groups.
        activation: as in `PackedLinear`.

    Raises:
        UsageError: another activation, or a padding that is not a number of zeros.
    """

    _made_anew = ("_bias", "_by_size")

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None = None):
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise UsageError(f"expected a convolution padded with a number of zeros, got {conv}")
        self.padding, self.stride, self.dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
        self.groups = conv.groups
        super().__init__(conv, activation)

    def _start(self) -> None:
        super()._start()
        self._by_size: OrderedDict[torch.Size, Tensor] = OrderedDict()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to the convolved and activated map."""
        if not self._takes(x):
            return self.activation(
                F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            )
        packed = self._by_size.get(x.shape)
        if packed is None:
            packed = self._pack(x.shape)
        return torch.ops.mkldnn._convolution_pointwise.default(
            x,
            packed,
            self._bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            self.attribute,
            [],
            self.variant,
        )

    def _pack(self, size: torch.Size) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight.detach(), self.padding, self.stride, self.dilation, self.groups, list(size)
        )
        self._by_size[size] = packed
        while len(self._by_size) > _SIZES_KEPT:
            self._by_size.popitem(last=False)
        return packed
