"""Count the kernel launches and memory traffic of a model on a GPU, without one.

The forward pass runs on fake CUDA tensors, which have shapes, dtypes and strides but no values, so the model
takes the same branches as on a device. Each PyTorch operator counts:

- views and allocations: no launch;
- a convolution: one launch, and one more that adds its bias, as cuDNN's convolutions have none. PyTorch's own
  depthwise kernel, for maps that are not channels-last, adds the bias itself. A convolution of a map in
  channels-last format first copies a weight in another format;
- `addmm` with a full matrix to add, and `baddbmm`, out of place: a copy and a product;
- group norm: three launches; BatchNorm in evaluation mode: two;
- fused attention: one launch;
- a Triton operator of the library: its kernels, without the casts of its small parameters;
- every other operator: one launch.

A launch reads each input and writes each output once. What cuDNN and cuBLAS do inside an operator, such as
layout conversions of a convolution that is not channels-last, is not visible and not counted: the bytes are a
lower bound.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = re.compile(r"(?:(stages\.\d+)\.)?blocks\.\d+")
_FREE = (
    "_unsafe_view",
    "promote_types",
    "as_strided_",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "detach",
    "lift_fresh",
)
# Launches of operators that have more than one kernel.
_KERNELS = {
    "native_group_norm": 3,
    "native_batch_norm": 2,
    "_native_batch_norm_legit_no_training": 2,
    # Both directions in one launch, and their sum.
    "bidirectional_scan": 2,
}
# Compute capability of an H100 and H200.
_CAPABILITY = (9, 0)


@dataclass
class Traffic:
    """Launches of a part of a model and the bytes that they read and write.

    Attributes:
        launches: kernel launches.
        bytes: read and written, each tensor of a launch once.
        operators: launches by operator.
    """

    launches: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        """Start with no operators."""
        self.operators: dict[str, int] = {}

    def add(self, operator: str, launches: int, size: int) -> None:
        """Add an operator with its launches and bytes."""
        self.launches += launches
        self.bytes += size
        self.operators[operator] = self.operators.get(operator, 0) + launches


@dataclass(frozen=True, kw_only=True)
class LaunchReport:
    """Launches and bytes of one forward pass.

    Attributes:
        total: of the whole model.
        blocks: of the blocks of each stage ("stages.0", ...; "blocks" for a model without stages), summed.
        block_counts: number of blocks of each stage.
    """

    total: Traffic
    blocks: dict[str, Traffic]
    block_counts: dict[str, int]


def count_launches(
    model: nn.Module,
    input_size: tuple[int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    transform: Callable[[nn.Module], nn.Module] | None = None,
) -> LaunchReport:
    """Count the kernel launches and bytes of a forward pass on a GPU: the one present, or else an H100.

    Nothing is computed and no device is needed; the model is not changed.

    Args:
        model: any model, in evaluation mode.
        input_size: (B, C, H, W) of the images.
        dtype: dtype of the weights and images.
        transform: applied to the model on the fake device before the pass, such as `lightspine.optimize`.

    Returns:
        The counts of the whole model and of its blocks.
    """
    duplicate = copy.deepcopy(model)
    with _fake_device() as mode:
        fake = _on_fake_device(duplicate, dtype)
        if transform is not None:
            with warnings.catch_warnings():
                # Copying a buffer asks for its address.
                warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
                fake = transform(fake)
        images = torch.empty(input_size, dtype=dtype, device="cuda")
        counter = _Counter(mode)
        with counter.blocks_of(fake), torch.no_grad(), _FusedAttention(counter), counter:
            fake(images)
    return LaunchReport(total=counter.total, blocks=counter.blocks, block_counts=counter.block_counts)


class _SharedFakeMode(FakeTensorMode):
    """Fake mode that copies of its tensors share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedFakeMode":
        return self


@contextmanager
def _fake_device() -> Iterator[_SharedFakeMode]:
    with _SharedFakeMode() as mode, ExitStack() as replaced:
        # Where there is a device, the model takes its own branches on that one.
        if not torch.cuda.is_available():
            for name, function in (
                ("torch.cuda.get_device_capability", lambda *_: _CAPABILITY),
                ("torch._C._conv_determine_backend_memory_format", _cudnn_memory_format),
            ):
                replaced.enter_context(mock.patch(name, function))
        yield mode


def _cudnn_memory_format(x: Tensor, weight: Tensor, _: object) -> torch.memory_format:
    """Return the format of a convolution's output on a device; without one, PyTorch assumes no cuDNN."""
    wanted = torch.channels_last
    if x.dim() == 4 and any(_is_only(t, wanted) for t in (x, weight)):
        return wanted
    return torch.contiguous_format


def _is_only(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=memory_format) and not tensor.is_contiguous()


def _on_fake_device(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace all parameters and buffers by fake tensors of the same layout."""

    def fake(tensor: Tensor) -> Tensor:
        chosen = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=chosen, device="cuda")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model


class _Counter(TorchDispatchMode):
    """Counts the operators of a forward pass by the block that calls them."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.total = Traffic()
        self.blocks: dict[str, Traffic] = {}
        self.block_counts: dict[str, int] = {}
        self.paused = False
        self._stage: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused and func.namespace != "prim":
            name = func._schema.name.partition("::")[2]
            launches, size = _count_operator(func, name, args, kwargs or {}, out)
            if launches:
                self.record(name, launches, size)
        return out

    def record(self, name: str, launches: int, size: int) -> None:
        """Add the launches of an operator."""
        self.total.add(name, launches, size)
        if self._stage is not None:
            self.blocks[self._stage].add(name, launches, size)

    @contextmanager
    def blocks_of(self, model: nn.Module) -> Iterator[None]:
        """Attribute operators to the block that is running."""
        handles = []
        for name, module in model.named_modules():
            match = _BLOCK.fullmatch(name)
            if match is None:
                continue
            stage = match[1] or "blocks"
            self.blocks.setdefault(stage, Traffic())
            self.block_counts[stage] = self.block_counts.get(stage, 0) + 1

            def enter(*_: object, stage: str = stage) -> None:
                self._stage = stage

            def leave(*_: object) -> None:
                self._stage = None

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _FusedAttention(TorchFunctionMode):
    """Counts attention as the one kernel that it is on a GPU; fake tensors decompose it."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.counter.paused = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self.counter.paused = False
        self.counter.record("scaled_dot_product_attention", 1, _bytes([*args[:3], out]))
        return out


def _count_operator(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[int, int]:
    """Return the kernel launches of an operator, and the bytes that they read and write."""
    schema = func._schema
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if name in _FREE or (views and not writes):
        return 0, 0
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if name == "convolution":
        return _count_convolution(args, written[0])
    if name == "_to_copy" and len(read) == 1 and _same_storage(read[0], written[0]):
        return 0, 0
    size = _bytes(read) + _bytes(written)
    # Out of place, the matrix to add is first copied to the output.
    if (name == "addmm" and args[0].dim() == 2) or name == "baddbmm":
        return 2, size + _bytes([args[0], written[0]])
    return _KERNELS.get(name, 1), size


def _count_convolution(args: tuple[Any, ...], out: Tensor) -> tuple[int, int]:
    x, weight, bias, groups = args[0], args[1], args[2], args[8]
    launches, size = 1, _bytes([x, weight, out])
    last = {"memory_format": torch.channels_last}
    channels_last = out.dim() == 4 and _is_only(out, torch.channels_last)
    if channels_last and not weight.is_contiguous(**last):
        launches, size = launches + 1, size + 2 * _bytes([weight])
    if channels_last and not x.is_contiguous(**last):
        launches, size = launches + 1, size + 2 * _bytes([x])
    depthwise = groups == x.shape[1] > 1
    if bias is not None and (channels_last or not depthwise):
        launches, size = launches + 1, size + 2 * _bytes([out]) + _bytes([bias])
    return launches, size


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _bytes(tensors: list[Any]) -> int:
    """Return the size of tensors; dimensions along which a tensor is expanded count once."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            sides = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
            numbers = 0 if 0 in tensor.shape else int(torch.Size(sides).numel())
            total += numbers * tensor.element_size()
    return total
