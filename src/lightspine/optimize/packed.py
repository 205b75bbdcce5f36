"""Linear layers and convolutions fused with the operation that follows, with weights packed for oneDNN.

On a CPU, PyTorch computes float32 matrix products with MKL, which on AMD processors is slower than oneDNN,
and reorders the weights of convolutions and bfloat16 products at every call. oneDNN also applies an
activation, or adds or multiplies by a second tensor, before the result leaves the registers. The operators
are those that `torch.compile` uses for a frozen model. They are not part of PyTorch's public interface, so
`packing_available` checks for them.

On a CUDA device nothing is packed. Products with a bias and a ReLU, or in bfloat16 a GELU, are one launch of
cuBLAS, 1x1 convolutions of channels-last maps are products, and additions overwrite the result of a product
instead of allocating another one.

Each layer falls back to the plain one, with the same weights, on another device or dtype, under autocast,
while gradients are recorded, under `torch.func` transforms, and in a trace, a compiler or an export. On a CPU
it therefore keeps both forms of its weights in memory. The packed form follows `to`, `load_state_dict`,
copies and pickles, but no in-place change of `weight`.
"""

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Sigmoid as TimmSigmoid
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.derivatives import in_transform
from lightspine.optimize import target

Model = TypeVar("Model", bound=nn.Module)

# oneDNN's name and algorithm of each activation that can be fused.
_ACTIVATIONS = {
    nn.Identity: ("none", ""),
    nn.ReLU: ("relu", ""),
    nn.SiLU: ("swish", ""),
    nn.Sigmoid: ("sigmoid", ""),
    TimmSigmoid: ("sigmoid", ""),
    nn.GELU: ("gelu", "none"),
}
_OPERATORS = (
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_is_mkldnn_bf16_supported",
)
# Number of input sizes for which a convolution keeps packed weights.
_CACHED_SIZES = 4
# A float32 product with fewer multiplications takes less time than the call of oneDNN.
_SMALL_PRODUCT = 2**18


def packing_available() -> tuple[bool, str]:
    """Return whether weights can be packed for oneDNN, and for which tensors or why not."""
    if not torch.backends.mkldnn.is_available():
        return False, "this PyTorch is built without oneDNN"
    for name in _OPERATORS:
        if not hasattr(torch.ops.mkldnn, name):
            return False, f"this PyTorch has no operator mkldnn::{name}"
    return True, "CPU tensors in float32, and in bfloat16 where the processor has it"


def can_fuse(activation: nn.Module) -> bool:
    """Return whether the packed layers accept an activation."""
    if isinstance(activation, nn.GELU):
        return type(activation) is nn.GELU and activation.approximate == "none"
    return type(activation) in _ACTIVATIONS


class _PackedLayer(nn.Module):
    """Base class: chooses between packed and plain weights and keeps the packed ones up to date."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    can_pack: bool
    _derived: tuple[str, ...] = ("_bias",)

    def __init__(self, layer: nn.Linear | nn.Conv2d, activation: nn.Module | None):
        super().__init__()
        self.activation = nn.Identity() if activation is None else activation
        if not can_fuse(self.activation):
            names = ", ".join(kind.__name__ for kind in _ACTIVATIONS if kind is not TimmSigmoid)
            raise UsageError(f"expected an activation of {names}, got {self.activation}")
        self.attribute, self.variant = _ACTIVATIONS[type(self.activation)]
        source: Any = layer
        self.weight, self.bias = source.weight, source.bias
        self._start()

    def _start(self) -> None:
        """Discard packed weights and check whether the current ones can be packed."""
        weight = self.weight
        # Plain attributes, because nn.Module looks up parameters several times more slowly.
        self._dtype = weight.dtype
        self._bias = None if self.bias is None else self.bias.detach()
        self.on_cuda = target.on_cuda(weight)
        self.can_pack = weight.device.type == "cpu" and not self.on_cuda and packing_available()[0]
        if self.can_pack and weight.dtype == torch.bfloat16:
            self.can_pack = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        elif weight.dtype != torch.float32:
            self.can_pack = False
        self._few_numbers = _SMALL_PRODUCT // weight.shape[0] if weight.dtype == torch.float32 else 0

    def _takes(self, x: Any) -> bool:
        """Return whether a call with this input can use the packed weights."""
        return self.can_pack and self._is_inference(x) and bool(x.is_cpu)

    def _fuses(self, x: Any) -> bool:
        """Return whether a call with this input can use the fused operations of a CUDA device."""
        return self.on_cuda and self._is_inference(x) and target.on_cuda(x)

    def _is_inference(self, x: Any) -> bool:
        """Return whether a call only computes values, in the dtype of the weights."""
        # Compilers, tracers and exporters must see the plain layer. Tracing is checked first, because a proxy
        # has no dtype.
        tracing = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
        return (
            not tracing
            and not torch.compiler.is_compiling()
            and not in_transform()
            and x.dtype == self._dtype
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return `activation(x @ matrix^T + bias)`, in as few launches of a CUDA device as possible."""
        # In bfloat16 the GELU of cuBLAS, by the hyperbolic tangent, differs by less than the rounding.
        fused = self.attribute == "relu" or (self.attribute == "gelu" and x.dtype == torch.bfloat16)
        if not fused or self._bias is None:
            return self.activation(F.linear(x, matrix, self._bias))
        rows = x.reshape(-1, x.shape[-1])
        y = torch._addmm_activation(self._bias, rows, matrix.t(), use_gelu=self.attribute == "gelu")
        # Not -1 for the last size, which an empty batch would leave open.
        return y.view(*x.shape[:-1], matrix.shape[0])

    def __getstate__(self) -> dict[str, Any]:
        # Packed tensors can be neither copied nor pickled; __setstate__ makes them again.
        return {**self.__dict__, **dict.fromkeys(self._derived)}

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
        """Return sizes and whether the weights can be packed."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, packed={self.can_pack}"


class PackedLinear(_PackedLayer):
    """Linear layer with packed weights and a fused activation.

    Args:
        linear: layer that provides weight and bias.
        activation: `nn.Identity`, `nn.ReLU`, `nn.SiLU`, `nn.Sigmoid` or exact `nn.GELU`; `None` for none.

    Raises:
        UsageError: another activation.
    """

    _derived = ("_bias", "_packed")

    def __init__(self, linear: nn.Linear, activation: nn.Module | None = None):
        super().__init__(linear, activation)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _start(self) -> None:
        super()._start()
        self._packed: Tensor | None = None
        if self.can_pack:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if self._fuses(x):
            return self._multiply(x, self.weight)
        if not self._takes(x) or x.numel() < self._few_numbers:
            return self.activation(F.linear(x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, self._bias, self.attribute, [], self.variant
        )


class PackedBinaryLinear(PackedLinear):
    """Linear layer with packed weights whose output is added to, or multiplied by, a second tensor.

    Args:
        linear: layer that provides weight and bias.
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
        if self._fuses(x) and other.dtype == y.dtype:
            return y.add_(other) if self.operation == "add" else y.mul_(other)
        return y + other if self.operation == "add" else y * other


class _PackedConv(_PackedLayer):
    """Base class of the packed convolutions, whose result is in `torch.channels_last` format."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None, keep_layout: bool):
        self.keep_layout = keep_layout
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.groups = conv.kernel_size, conv.groups
        super().__init__(conv, activation)

    def _takes(self, x: Any) -> bool:
        return super()._takes(x) and not (self.keep_layout and not _stays_channels_last(x))

    def _fuses(self, x: Any) -> bool:
        return super()._fuses(x) and _stays_channels_last(x)


def _stays_channels_last(x: Tensor) -> bool:
    """Whether a plain convolution of a map gives a result that is in channels-last format too."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    # A map with one channel is in both formats, and the convolution treats it as contiguous. With one pixel,
    # the result is the same in both formats.
    return not x.is_contiguous() or (x.shape[2] == 1 and x.shape[3] == 1)


class PackedConv2d(_PackedConv):
    """Convolution with packed weights and a fused activation.

    The best layout of the weights depends on the size of the input, so they are packed at the first call of
    each size, which is as slow as a plain convolution, and cached for the last four sizes.

    Args:
        conv: layer that provides weight, bias, stride, padding, dilation and groups.
        activation: as in `PackedLinear`.
        keep_layout: use the packed weights only for inputs in `torch.channels_last` format, so that the
            result has the memory format of the plain convolution's.

    Raises:
        UsageError: another activation, or a padding that is not a number of zeros.
    """

    _derived = ("_bias", "_packed_by_size")

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None = None, keep_layout: bool = False):
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise UsageError(f"expected a convolution padded with a number of zeros, got {conv}")
        self.padding, self.stride, self.dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
        super().__init__(conv, activation, keep_layout)

    def _start(self) -> None:
        super()._start()
        self._packed_by_size: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to the convolved and activated map."""
        if not self._takes(x):
            return self.activation(
                F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            )
        packed = self._packed_by_size.get(x.shape)
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
        # A new dictionary, because other threads may read the old one.
        kept = list(self._packed_by_size.items())[-(_CACHED_SIZES - 1) :]
        self._packed_by_size = {**dict(kept), size: packed}
        return packed


def is_pointwise(conv: nn.Module) -> bool:
    """Return whether a module is a 1x1 convolution without groups, stride or padding."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
        and conv.groups == 1
    )


class PackedPointwise(_PackedConv):
    """1x1 convolution as a packed matrix product, with a fused activation or addition.

    A 1x1 convolution of a channels-last map is a matrix product, which needs neither a reordering of the
    weights at each call nor, for a single image on one thread, a copy of the map.

    Args:
        conv: convolution of kernel 1 without groups, stride or padding.
        activation: as in `PackedLinear`.
        keep_layout: as in `PackedConv2d`.

    Raises:
        UsageError: another kind of convolution, or of activation.
    """

    _derived = ("_bias", "_packed", "_matrix")

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None = None, keep_layout: bool = False):
        if not is_pointwise(conv):
            raise UsageError(f"expected a 1x1 convolution without groups, stride or padding, got {conv}")
        super().__init__(conv, activation, keep_layout)

    def _start(self) -> None:
        super()._start()
        self._packed: Tensor | None = None
        self._matrix = self.weight.detach().flatten(1)
        if self.can_pack:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._matrix)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, H, W) to `activation(conv(x))`, or to `activation(conv(x)) + add`."""
        if self._fuses(x):
            y = self._multiply(x.permute(0, 2, 3, 1), self._matrix).permute(0, 3, 1, 2)
            return y if add is None else y.add_(add) if add.dtype == y.dtype else y + add
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
        # The overload is named, because choosing it makes PyTorch format the tensors into a discarded error.
        y = torch.ops.mkldnn._linear_pointwise.binary(
            tokens, add.permute(0, 2, 3, 1), self._packed, self._bias, "add"
        )
        return y.permute(0, 3, 1, 2)


def pack_sequence(*layers: nn.Module) -> nn.Sequential:
    """Return layers as one `nn.Sequential`, each convolution packed with the activation behind it."""
    plain = [layer for module in layers for layer in _flatten(module)]
    packed: list[nn.Module] = []
    while plain:
        layer = plain.pop(0)
        if isinstance(layer, nn.Conv2d):
            activation = plain.pop(0) if plain and can_fuse(plain[0]) else None
            kind = PackedPointwise if is_pointwise(layer) else PackedConv2d
            packed.append(kind(layer, activation))
        else:
            packed.append(layer)
    return nn.Sequential(*packed).eval()


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for layer in module:
            yield from _flatten(layer)
    elif not isinstance(module, nn.Identity):
        yield module
