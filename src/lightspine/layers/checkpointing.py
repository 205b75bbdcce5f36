"""Activation checkpointing: of modules, and of everything but the scans of a function."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightspine.ops.derivatives import in_transform
from lightspine.ops.dispatch import is_exporting


class _SkipScans(TorchDispatchMode):
    """Skips the scans during recomputation: their backward needs their inputs, never their output."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.lightspine.selective_scan.default:
            return _placeholder(args[0], args[0].dtype), args[0].new_empty(0), _no_saved_states(args[0])
        if func is torch.ops.lightspine.bidirectional_scan.default:
            u = args[0]
            return _placeholder(u[:, : u.shape[1] // 2], u.dtype)
        if func is torch.ops.lightspine.cross_scan.default:
            kept = _no_saved_states(args[0])
            return _placeholder(args[0], kept.dtype), kept
        if func is torch.ops.lightspine.fused_cross_scan.default:
            kept = _no_saved_states(args[0])
            return _placeholder(args[0], kept.dtype), kept, kept.clone()
        return func(*args, **(kwargs or {}))


def _placeholder(x: Tensor, dtype: torch.dtype) -> Tensor:
    # One number in memory. NaN makes a gradient that depends on it visible.
    return x.new_full((), float("nan"), dtype=dtype).expand(x.shape)


def _no_saved_states(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def checkpoint_scan(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Return `function(*tensors)` and recompute everything but its scans in the backward pass.

    Only the tensors are saved (Vision Mamba, arXiv:2401.09417, section on efficiency). Output
    and gradients equal those of the plain call, on a CPU bit for bit, also with the weights of
    `torch.func.functional_call`. Without gradients, in a
    trace or an export and under `torch.func` transforms it is the plain call.

    Args:
        function: computes the inputs of one or more scans and ends with these scans, called with
            `save_states=False`. The backward of operations behind the scans must not need a value, as for
            views and sums. It draws no random numbers.
        *tensors: arguments of the function; `None` is passed on.
    """
    traced = (
        is_exporting()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or any(isinstance(t, torch.fx.Proxy) for t in tensors)
    )
    # torch.func has no hooks for saved tensors, so it cannot recompute.
    if traced or not torch.is_grad_enabled() or in_transform():
        return function(*tensors)
    # torch.compile sees a plain checkpoint and removes unused scans by itself.
    if torch.compiler.is_compiling():
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    module = getattr(function, "__self__", None)
    if isinstance(module, nn.Module):
        function = _with_present_weights(module, function)
    return checkpoint(
        function, *tensors, use_reentrant=False, preserve_rng_state=False, context_fn=_skip_scans
    )


def checkpoint_module(module: nn.Module, x: Tensor) -> Any:
    """Return `module(x)` and recompute its activations in the backward pass.

    The recomputation uses the weights of the forward pass, also when these were given for one call, as by
    `torch.func.functional_call`.
    """
    function = module if torch.compiler.is_compiling() else _with_present_weights(module, module)
    return checkpoint(function, x, use_reentrant=False)


def _with_present_weights(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs another one, of a module, with the weights that the module has now."""
    present = [
        (part, name, tensor)
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
    ]

    def run(*args: Any) -> Any:
        if all(
            (part._parameters.get(n) if n in part._parameters else part._buffers.get(n)) is tensor
            for part, n, tensor in present
        ):
            return function(*args)
        prefixes = {part: f"module.{name}." if name else "module." for name, part in module.named_modules()}
        weights = {prefixes[part] + name: t for part, name, t in present if t is not None}
        return functional_call(_Function(module, function), weights, args)

    return run


class _Function(nn.Module):
    """Module whose forward is a function of another module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.function = None if function is module else function

    def forward(self, *args: Any) -> Any:
        return self.module(*args) if self.function is None else self.function(*args)


def _skip_scans() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the context managers of the forward pass and of its recomputation."""
    return nullcontext(), _SkipScans()
