"""The selective scan as one PyTorch operator: what compilers, exporters, tracers and FLOP counters see.

Outputs and gradients have fixed memory layouts, channels innermost (the layout of tokens), so that the shapes
and strides which a compiler is told hold on every backend.
"""

# The signatures of fake kernels and of FLOP formulas are given by PyTorch: they take more than they use.
# ruff: noqa: ARG001

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightspine.errors import UsageError
from lightspine.ops.cpu.config import saved_states_shape
from lightspine.ops.dispatch import choose_backend, keeps_states
from lightspine.ops.flops import counted_backward, counted_forward, scan_flops
from lightspine.ops.selective_scan import torch_backend
from lightspine.ops.selective_scan.checks import ScanInputs, check_inputs


@torch.library.custom_op("lightspine::selective_scan", mutates_args=())
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, D, L), the last state (B, D, N) and, with `keep`, states on the way.

    The arguments are those of `selective_scan`. What is kept serves the backward; how much, and whether
    anything, is up to the backend.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    check_inputs(inputs)
    implementation = _implementation(u, backend)
    if keeps_states(u.device.type, backend):
        out, state, kept = implementation.forward(inputs, delta_softplus, reverse, keep)
    else:
        out, state = implementation.forward(inputs, delta_softplus, reverse)
        kept = state.new_empty(0)
    return _channels_innermost(out), state.contiguous(), kept


@torch.library.custom_op("lightspine::selective_scan_backward", mutates_args=())
def selective_scan_backward_op(
    grad_out: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    kept: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u to delta_bias; an empty tensor for an input that was not given.

    `kept` is what the forward kept, or a tensor of size 0.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    check_inputs(inputs)
    implementation = _implementation(u, backend)
    noted = (kept,) if keeps_states(u.device.type, backend) else ()
    grads = implementation.backward(grad_out, grad_state, inputs, *noted, delta_softplus, reverse)
    return _lay_out(grads, u)


@selective_scan_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(ScanInputs(u, delta, A, B, C, D, z, delta_bias))
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    batch, dim, length = u.shape
    kept: tuple[int, ...] = (0,)
    if keep and keeps_states(u.device.type, backend):
        kept = saved_states_shape(batch, length, B.shape[1], dim // B.shape[1], A.shape[1])
    return (
        _empty_sequence(u),
        u.new_empty(batch, *A.shape, dtype=state_dtype),
        u.new_empty(kept, dtype=state_dtype),
    )


@selective_scan_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    kept: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = torch.empty_like
    grads = ScanInputs(
        empty(u),
        empty(delta),
        empty(A),
        empty(B),
        empty(C),
        None if D is None else empty(D),
        None if z is None else empty(z),
        None if delta_bias is None else empty(delta_bias),
    )
    return _lay_out(grads, u)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, delta_softplus, reverse, _, backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = delta_softplus, reverse, backend


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    grads = selective_scan_backward_op(grad_out, grad_state, *tensors, kept, *ctx.options)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None, None


selective_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _implementation(u: Tensor, backend: str) -> ModuleType:
    name = choose_backend(u.device.type, u.dtype, requested=backend)
    if name == "torch":
        return torch_backend
    if name == "cpu":
        # Imported where it is needed: numba takes half a second.
        from lightspine.ops.selective_scan import cpu_backend

        return cpu_backend
    if name == "triton":
        from lightspine.ops.selective_scan import triton_backend

        return triton_backend
    raise UsageError(
        f"the operator runs a kernel, received the backend {name!r}, which is plain PyTorch: "
        "call lightspine.ops.selective_scan.selective_scan with it"
    )


def _empty_sequence(t: Tensor) -> Tensor:
    batch, dim, length = t.shape
    return t.new_empty(batch, length, dim).transpose(1, 2)


def _channels_innermost(t: Tensor) -> Tensor:
    """Lay (B, D, L) out as (B, L, D) in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _lay_out(
    grads: ScanInputs, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias = grads
    return (
        _channels_innermost(grad_u),
        _channels_innermost(grad_delta),
        grad_A.contiguous(),
        grad_B.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        grad_C.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        u.new_empty(0) if grad_D is None else grad_D.contiguous(),
        u.new_empty(0) if grad_z is None else _channels_innermost(grad_z),
        u.new_empty(0) if grad_bias is None else grad_bias.contiguous(),
    )


@register_flop_formula(torch.ops.lightspine.selective_scan)
def _count_forward(
    u_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_forward(_published_flops(u_shape, A_shape, shapes))


@register_flop_formula(torch.ops.lightspine.selective_scan_backward)
def _count_backward(
    grad_out_shape: torch.Size,
    grad_state_shape: torch.Size,
    u_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_backward(_published_flops(u_shape, A_shape, shapes))


def _published_flops(u_shape: torch.Size, A_shape: torch.Size, shapes: tuple[object, ...]) -> int:
    batch, dim, length = u_shape
    _, _, D_shape, z_shape = shapes[:4]
    return scan_flops(batch, length, dim, A_shape[1], with_D=D_shape is not None, with_z=z_shape is not None)
