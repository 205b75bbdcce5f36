"""Compute what a scan reads again in the backward, in place of keeping it since the forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


class _WithoutScans(TorchDispatchMode):
    """Skips the scans of a recomputation: their backward asks for their inputs, never for their output."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.lightspine.selective_scan.default:
            return _unread(args[0], args[0].dtype), args[0].new_empty(0), _nothing_kept(args[0])
        if func is torch.ops.lightspine.cross_scan.default:
            kept = _nothing_kept(args[0])
            return _unread(args[0], kept.dtype), kept
        return func(*args, **(kwargs or {}))


def _unread(x: Tensor, dtype: torch.dtype) -> Tensor:
    # One number in memory. NaN, so that a gradient which did depend on it could not go unnoticed.
    return x.new_full((), float("nan"), dtype=dtype).expand(x.shape)


def _nothing_kept(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def recompute_before_scan(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `function(*tensors)`, whose backward computes everything but the scans in it again.

    Nothing but the tensors themselves is kept for the backward (Vision Mamba, arXiv:2401.09417, section on
    efficiency). Numbers and gradients are those of the plain call, on a CPU bit for bit. Where no gradient is
    recorded, under `torch.fx` and in an export it is the plain call.

    Args:
        function: computes the inputs of one or more scans and ends with these scans: the backward of what
            follows them must need no value (that of views and sums does not). The scans are called with
            `save_states=False`. It draws no random numbers.
        *tensors: its arguments.
    """
    traced = torch.compiler.is_exporting() or any(isinstance(t, torch.fx.Proxy) for t in tensors)
    if traced or not torch.is_grad_enabled():
        return function(*tensors)
    # A compiler sees an ordinary checkpoint and leaves out by itself what nobody reads.
    skip: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _skip_scans}
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False, **skip)


def _skip_scans() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of the forward and of its recomputation."""
    return nullcontext(), _WithoutScans()
