"""The selective scan by the Triton kernels: tokens are read and written where they lie."""

import torch
from torch import Tensor

from lightspine.ops.selective_scan.checks import ScanInputs
from lightspine.ops.triton.launch import GroupedInputs, grouped_scan, grouped_scan_backward


def forward(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the output (B, D, L) and the last state (B, D, N)."""
    grouped = _grouped(inputs, delta_softplus, reverse)
    out = torch.empty(grouped.x.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    state = grouped_scan(grouped, out)
    return _sequence(out), state.flatten(1, 2)


def backward(
    grad_out: Tensor, grad_state: Tensor, inputs: ScanInputs, delta_softplus: bool, reverse: bool
) -> ScanInputs:
    """Return the gradients of all inputs, in their shapes and dtypes."""
    u, _, A, B, C, D, _, delta_bias = inputs
    groups = B.shape[1]
    grouped = _grouped(inputs, delta_softplus, reverse)
    grad_u = torch.empty(grouped.x.shape, dtype=u.dtype, device=u.device)
    grads, grad_z = grouped_scan_backward(
        _tokens(grad_out, groups), grad_state.unflatten(1, (groups, -1)), grouped, grad_u
    )
    return ScanInputs(
        _sequence(grad_u),
        _sequence(grads.delta),
        grads.A.flatten(0, 1).to(A.dtype),
        grads.B.permute(0, 2, 3, 1).to(B.dtype),
        grads.C.permute(0, 2, 3, 1).to(C.dtype),
        None if D is None or grads.D is None else grads.D.flatten().to(D.dtype),
        None if grad_z is None else _sequence(grad_z),
        None
        if delta_bias is None or grads.delta_bias is None
        else grads.delta_bias.flatten().to(delta_bias.dtype),
    )


def _grouped(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> GroupedInputs:
    u, delta, A, B, C, D, z, delta_bias = inputs
    groups = B.shape[1]
    return GroupedInputs(
        _tokens(u, groups),
        _tokens(delta, groups),
        A.unflatten(0, (groups, -1)),
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        None if D is None else D.unflatten(0, (groups, -1)),
        None if z is None else _tokens(z, groups),
        None if delta_bias is None else delta_bias.unflatten(0, (groups, -1)),
        delta_softplus,
        reverse,
        None,
    )


def _tokens(t: Tensor, groups: int) -> Tensor:
    """(B, D, L) -> (B, L, K, D / K), channels adjacent: a view of tokens, a copy of anything else."""
    t = t.transpose(1, 2)
    return (t if t.stride(-1) == 1 else t.contiguous()).unflatten(2, (groups, -1))


def _sequence(t: Tensor) -> Tensor:
    """(B, L, K, D / K) -> (B, D, L), a view."""
    return t.flatten(2).transpose(1, 2)
