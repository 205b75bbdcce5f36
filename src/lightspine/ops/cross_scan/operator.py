"""The scan over a map as one PyTorch operator: what compilers, exporters, tracers and FLOP counters see."""

# The signatures of fake kernels and of FLOP formulas are given by PyTorch: they take more than they use.
# ruff: noqa: ARG001

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightspine.errors import UsageError
from lightspine.ops.cpu.config import saved_states_shape
from lightspine.ops.cross_scan import torch_backend
from lightspine.ops.cross_scan.checks import CrossScanInputs, check_inputs
from lightspine.ops.dispatch import choose_backend, keeps_states
from lightspine.ops.flops import counted_backward, counted_forward, scan_flops


@torch.library.custom_op("lightspine::cross_scan", mutates_args=())
def cross_scan_op(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the sum over the directions, contiguous (B, H, W, D), and, with `keep`, states on the way.

    The arguments are those of `cross_scan`. What is kept serves the backward; how much, and whether anything,
    is up to the backend.
    """
    inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
    check_inputs(inputs)
    implementation = _implementation(x, backend)
    if keeps_states(x.device.type, backend):
        out, kept = implementation.forward(inputs, delta_softplus, order, keep)
    else:
        out = implementation.forward(inputs, delta_softplus, order)
        kept = out.new_empty(0)
    return out.contiguous(), kept


@torch.library.custom_op("lightspine::cross_scan_backward", mutates_args=())
def cross_scan_backward_op(
    grad_out: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    kept: Tensor,
    delta_softplus: bool,
    order: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the contiguous gradients of x to delta_bias; an empty tensor for an input that was not given.

    `kept` is what the forward kept, or a tensor of size 0.
    """
    inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
    check_inputs(inputs)
    noted = (kept,) if keeps_states(x.device.type, backend) else ()
    return _lay_out(_implementation(x, backend).backward(grad_out, inputs, *noted, delta_softplus, order), x)


@cross_scan_op.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_inputs(CrossScanInputs(x, delta, A, B, C, D, delta_bias))
    batch, height, width, dim = x.shape
    kept: tuple[int, ...] = (0,)
    if keep and keeps_states(x.device.type, backend):
        kept = saved_states_shape(batch, height * width, A.shape[0], dim, A.shape[2])
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(kept, dtype=dtype)


@cross_scan_backward_op.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    kept: Tensor,
    delta_softplus: bool,
    order: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = torch.empty_like
    grads = CrossScanInputs(
        empty(x),
        empty(delta),
        empty(A),
        empty(B),
        empty(C),
        None if D is None else empty(D),
        None if delta_bias is None else empty(delta_bias),
    )
    return _lay_out(grads, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, delta_softplus, order, _, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = delta_softplus, order, backend


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    grads = cross_scan_backward_op(grad_out, *tensors, kept, *ctx.options)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None, None


cross_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _implementation(x: Tensor, backend: str) -> ModuleType:
    name = choose_backend(x.device.type, x.dtype, requested=backend)
    if name == "torch":
        return torch_backend
    if name == "cpu":
        # Imported where it is needed: numba takes half a second.
        from lightspine.ops.cross_scan import cpu_backend

        return cpu_backend
    if name == "triton":
        from lightspine.ops.cross_scan import triton_backend

        return triton_backend
    raise UsageError(
        f"the operator runs a kernel, received the backend {name!r}, which is plain PyTorch: "
        "call lightspine.ops.cross_scan.cross_scan with it"
    )


def _lay_out(
    grads: CrossScanInputs, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = [x.new_empty(0) if grad is None else grad.contiguous() for grad in grads]
    return given[0], given[1], given[2], given[3], given[4], given[5], given[6]


@register_flop_formula(torch.ops.lightspine.cross_scan)
def _count_forward(
    x_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_forward(_published_flops(x_shape, A_shape, shapes))


@register_flop_formula(torch.ops.lightspine.cross_scan_backward)
def _count_backward(
    grad_out_shape: torch.Size,
    x_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_backward(_published_flops(x_shape, A_shape, shapes))


def _published_flops(x_shape: torch.Size, A_shape: torch.Size, shapes: tuple[object, ...]) -> int:
    batch, height, width, dim = x_shape
    groups, _, state_dim = A_shape
    return scan_flops(batch, height * width, groups * dim, state_dim, with_D=shapes[2] is not None)
