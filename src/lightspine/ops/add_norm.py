"""Residual addition and layer norm or RMS norm in one pass over the memory, for inference on CUDA."""

# PyTorch prescribes the signatures of fake kernels.
# ruff: noqa: ARG001

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from lightspine.ops.derivatives import in_transform
from lightspine.ops.dispatch import choose_backend, is_exporting


def add_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add to a residual stream and normalize the sum over the channels.

    On CUDA one Triton kernel reads x and the update once and writes both results, in place of an addition, a
    conversion and a norm. It has no derivative: while gradients are recorded or traced, under autocast and in
    compilers, which fuse these operations themselves, they are PyTorch's.

    Args:
        x: residual stream, (..., C).
        update: what to add to it, (..., C); `None` for the norm of x alone.
        weight: (C,).
        bias: (C,), or `None`.
        eps: added to the variance.
        rms: RMS norm instead of layer norm.
        backend: "auto", "torch" or "triton".

    Returns:
        `x + update` in the dtype of x (x itself without an update), and its norm in the dtype of `weight`.

    Raises:
        UsageError: a backend that is unknown or cannot run here.
    """
    if _runs_kernel(x, (x, update, weight, bias), backend):
        if update is None:
            return x, torch.ops.lightspine.norm(x, weight, bias, eps, rms)
        total, out = torch.ops.lightspine.add_norm(x, update, weight, bias, eps, rms)
        return total, out
    if update is not None:
        x = (x + update).to(x.dtype)
    y = x.to(weight.dtype)
    if rms:
        return x, F.rms_norm(y, weight.shape, weight, eps)
    return x, F.layer_norm(y, weight.shape, weight, bias, eps)


def _runs_kernel(x: Any, tensors: tuple[Tensor | None, ...], backend: str) -> bool:
    # Tracing is checked first, because a proxy has no device.
    tracing = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if tracing or torch.compiler.is_compiling() or in_transform():
        return False
    if choose_backend(x.device.type, x.dtype, is_exporting(), backend) != "triton":
        return False
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return not recorded and not torch.is_autocast_enabled(x.device.type)


@torch.library.custom_op("lightspine::add_norm", mutates_args=())
def add_norm_op(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Return `add_norm` by the Triton kernel."""
    from lightspine.ops.triton import norm_launch

    return norm_launch.add_norm(x, update, weight, bias, eps, rms)


@torch.library.custom_op("lightspine::norm", mutates_args=())
def norm_op(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """Return the norm of x by the Triton kernel."""
    from lightspine.ops.triton import norm_launch

    return norm_launch.add_norm(x, None, weight, bias, eps, rms)[1]


@add_norm_op.register_fake
def _(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(x.shape)


@norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    return weight.new_empty(x.shape)
