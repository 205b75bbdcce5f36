"""Activation checkpointing for the inputs of a scan: recompute them in the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


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


def checkpoint_scan(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `function(*tensors)` and recompute everything but its scans in the backward pass.

    Only the tensors are saved (Vision Mamba, arXiv:2401.09417, section on efficiency). Output
    and gradients equal those of the plain call, on a CPU bit for bit. Without gradients, under `torch.fx` and
    in an export it is the plain call.

    Args:
        function: computes the inputs of one or more scans and ends with these scans, called with
            `save_states=False`. The backward of operations behind the scans must not need a value, as for
            views and sums. It draws no random numbers.
        *tensors: arguments of the function.
    """
    traced = torch.compiler.is_exporting() or any(isinstance(t, torch.fx.Proxy) for t in tensors)
    if traced or not torch.is_grad_enabled():
        return function(*tensors)
    # torch.compile sees a plain checkpoint and removes unused scans by itself.
    skip: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _skip_scans}
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False, **skip)


def _skip_scans() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the context managers of the forward pass and of its recomputation."""
    return nullcontext(), _SkipScans()
