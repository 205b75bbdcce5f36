"""Bidirectional selective scan: one scan forward and one backward over the same positions, summed."""

# PyTorch prescribes the signatures of fake kernels and FLOP formulas.
# ruff: noqa: ARG001

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightspine.errors import UsageError
from lightspine.ops.derivatives import differentiable_gradients, in_transform, refuse_forward_mode
from lightspine.ops.dispatch import choose_backend, is_exporting, load_backend
from lightspine.ops.flops import counted_backward, counted_forward, scan_flops
from lightspine.ops.inputs import SelectiveScanInputs, check_selective_scan, check_tensor
from lightspine.ops.selective_scan import empty_gradients, or_empty, scan


def bidirectional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Run the two selective scans of Vision Mamba (section 3.3) and add their outputs.

    Triton kernels scan both directions in one launch; other backends scan one after the other. No states are
    saved for the backward, which recomputes them.

    Args:
        u: input, (B, 2 D, L): the channels of the forward scan, then those of the scan from the last position
            to the first. Nothing is flipped: both are in the order of the positions.
        delta: dt before bias and softplus, (B, 2 D, L).
        A: state matrices, (2 D, N).
        B: input projections, (B, 2, N, L).
        C: output projections, (B, 2, N, L).
        D: skip connections, (2 D,).
        z: gate of both directions, (B, D, L): the output is multiplied by SiLU(z).
        delta_bias: added to delta, (2 D,).
        delta_softplus: apply softplus to delta after its bias.
        backend: "auto" (by the device of `u`), or one of `lightspine.ops.available_backends()`.

    Returns:
        The output, (B, D, L), channels innermost in memory, in the dtype of `u`.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, or a backend that is unknown or cannot run
            here.
    """
    inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
    name = choose_backend(u.device.type, u.dtype, is_exporting(), backend)
    if name == "triton" and not in_transform():
        out: Tensor = torch.ops.lightspine.bidirectional_scan(*inputs, delta_softplus)
        return out
    _check(inputs)
    return _scan_one_after_the_other(*inputs, delta_softplus=delta_softplus, backend=backend)


def _scan_one_after_the_other(*tensors: Any, delta_softplus: bool, backend: str) -> Tensor:
    forward, backward = _split_directions(SelectiveScanInputs(*tensors))
    out = scan(*forward, delta_softplus, False, backend, save_states=False)
    return out + scan(*backward, delta_softplus, True, backend, save_states=False)


def _check(inputs: SelectiveScanInputs) -> None:
    """Check both directions.

    Raises:
        UsageError: a wrong shape or dtype, or tensors on several devices.
    """
    check_selective_scan(inputs._replace(z=None))
    u, z = inputs.u, inputs.z
    if inputs.B.shape[1] != 2:
        raise UsageError(
            f"bidirectional_scan expects B of shape (B, 2, N, L), received {tuple(inputs.B.shape)}"
        )
    if z is not None:
        batch, dim, length = u.shape
        check_tensor("bidirectional_scan", "z", z, (batch, dim // 2, length), u.device)


def _split_directions(inputs: SelectiveScanInputs) -> tuple[SelectiveScanInputs, SelectiveScanInputs]:
    """Return the inputs of the forward scan and those of the backward scan."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    dim = A.shape[0] // 2
    forward, backward = (
        SelectiveScanInputs(
            u[:, part],
            delta[:, part],
            A[part],
            B[:, k : k + 1],
            C[:, k : k + 1],
            None if D is None else D[part],
            z,
            None if delta_bias is None else delta_bias[part],
        )
        for k, part in enumerate((slice(0, dim), slice(dim, 2 * dim)))
    )
    return forward, backward


@torch.library.custom_op("lightspine::bidirectional_scan", mutates_args=())
def bidirectional_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Return `bidirectional_scan` by the Triton kernels."""
    refuse_forward_mode("bidirectional_scan")
    inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
    _check(inputs)
    out: Tensor = load_backend("triton").bidirectional_scan(inputs, delta_softplus)
    return out


@torch.library.custom_op("lightspine::bidirectional_scan_backward", mutates_args=())
def bidirectional_scan_backward_op(
    grad_out: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u to delta_bias; an empty tensor for an input that was not given."""
    refuse_forward_mode("bidirectional_scan_backward")
    inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
    grads = load_backend("triton").bidirectional_scan_backward(grad_out, inputs, delta_softplus)
    return or_empty(grads, u)


@bidirectional_scan_op.register_fake
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
) -> Tensor:
    _check(SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias))
    batch, dim, length = u.shape
    return u.new_empty(batch, length, dim // 2).transpose(1, 2)


@bidirectional_scan_backward_op.register_fake
def _(
    grad_out: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return or_empty(empty_gradients(SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)), u)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradients are to be differentiated (create_graph=True)
        # The selective scan on the same backend has second derivatives.
        scans = functools.partial(
            _scan_one_after_the_other, delta_softplus=ctx.delta_softplus, backend="triton"
        )
        return *differentiable_gradients(scans, tensors, (grad_out,)), None
    grads = torch.ops.lightspine.bidirectional_scan_backward(grad_out, *tensors, ctx.delta_softplus)
    return *(None if t is None else grad for t, grad in zip(tensors, grads, strict=True)), None


bidirectional_scan_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lightspine.bidirectional_scan)
def _count_forward(
    u_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_forward(_published_flops(u_shape, A_shape, shapes))


@register_flop_formula(torch.ops.lightspine.bidirectional_scan_backward)
def _count_backward(
    grad_out_shape: torch.Size,
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
