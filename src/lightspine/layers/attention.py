"""Scaled dot-product attention that can be differentiated in every mode and any number of times."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from lightspine.ops.derivatives import differentiable_gradients, in_transform
from lightspine.ops.dispatch import is_exporting


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v, as `torch.nn.functional.scaled_dot_product_attention`.

    PyTorch's fused kernels have a first derivative in reverse mode only. Under `torch.func` transforms and
    forward-mode differentiation, and for second derivatives, standard operations are used.

    Args:
        q: queries, (..., L, C).
        k: keys, (..., S, C).
        v: values, (..., S, E).

    Returns:
        (..., L, E).
    """
    # TorchScript skips a branch only if its condition stands alone.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif in_transform():
        return _attend(q, k, v)
    elif is_exporting() and q.dim() == 3:
        # PyTorch's ONNX exporter knows only attention with an axis for heads.
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    out = F.scaled_dot_product_attention(q, k, v)
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return out
    return _with_second_derivatives(out, q, k, v)


@torch.jit.unused
def _with_second_derivatives(out: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Compilers and tracers have no second derivatives. A proxy is checked first: it has no flags.
    traced = isinstance(out, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or torch.compiler.is_compiling() or not out.requires_grad:
        return out
    return _SecondDerivatives.apply(out, q, k, v)


class _SecondDerivatives(torch.autograd.Function):
    """Identity of the output of a fused kernel: leads a backward with `create_graph=True` past the kernel."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad_out, None, None, None
        return None, *differentiable_gradients(_attend, ctx.saved_tensors, (grad_out,))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v
