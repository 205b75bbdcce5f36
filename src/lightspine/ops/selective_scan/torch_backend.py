"""The selective scan by the blocked scan in standard PyTorch operations: any device, any exporter."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.ops.selective_scan.checks import ScanInputs
from lightspine.ops.torch_scan import GroupedScan, blocked_scan, blocked_scan_backward


def forward(
    inputs: ScanInputs, delta_softplus: bool, reverse: bool, run: GroupedScan = blocked_scan
) -> tuple[Tensor, Tensor]:
    """Return the output (B, D, L) and the last state (B, D, N)."""
    y, state = run(*_grouped(inputs, reverse), delta_softplus)
    y = _ungrouped(y, reverse)
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(y.dtype))
    return y.to(inputs.u.dtype), state.flatten(1, 2)


def backward(
    grad_out: Tensor, grad_state: Tensor, inputs: ScanInputs, delta_softplus: bool, reverse: bool
) -> ScanInputs:
    """Return the gradients of all inputs, in their shapes and dtypes."""
    arguments = _grouped(inputs, reverse)
    x, A, groups = arguments[0], inputs.A, inputs.B.shape[1]
    grad_y, grad_z = grad_out.to(x.dtype), None
    if inputs.z is not None:
        y, _ = blocked_scan(*arguments, delta_softplus)
        z = inputs.z.to(x.dtype)
        gate = torch.sigmoid(z)
        grad_z = grad_y * _ungrouped(y, reverse) * gate * (1 + z * (1 - gate))
        grad_y = grad_y * z * gate
    grads = blocked_scan_backward(
        _sequence(grad_y, groups, reverse),
        grad_state.to(x.dtype).unflatten(1, (groups, -1)),
        *arguments,
        delta_softplus,
    )
    return ScanInputs(
        _ungrouped(grads.x, reverse).to(inputs.u.dtype),
        _ungrouped(grads.delta, reverse).to(inputs.delta.dtype),
        grads.A.flatten(0, 1).to(A.dtype),
        _unprojected(grads.B, reverse).to(inputs.B.dtype),
        _unprojected(grads.C, reverse).to(inputs.C.dtype),
        None if grads.D is None or inputs.D is None else grads.D.flatten().to(inputs.D.dtype),
        None if grad_z is None or inputs.z is None else grad_z.to(inputs.z.dtype),
        None
        if grads.delta_bias is None or inputs.delta_bias is None
        else grads.delta_bias.flatten().to(inputs.delta_bias.dtype),
    )


def _grouped(
    inputs: ScanInputs, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    u, delta, A, B, C, D, _, delta_bias = inputs
    groups = B.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    return (
        _sequence(u.to(dtype), groups, reverse),
        _sequence(delta.to(dtype), groups, reverse),
        A.to(dtype).unflatten(0, (groups, -1)),
        _projection(B.to(dtype), reverse),
        _projection(C.to(dtype), reverse),
        None if D is None else D.to(dtype).unflatten(0, (groups, -1)),
        None if delta_bias is None else delta_bias.to(dtype).unflatten(0, (groups, -1)),
    )


def _sequence(t: Tensor, groups: int, reverse: bool) -> Tensor:
    """(B, D, L) -> (B, L, K, D / K), in the order of the walk."""
    t = t.transpose(1, 2).unflatten(2, (groups, -1))
    return t.flip(1) if reverse else t


def _ungrouped(t: Tensor, reverse: bool) -> Tensor:
    t = t.flip(1) if reverse else t
    return t.flatten(2).transpose(1, 2)


def _projection(t: Tensor, reverse: bool) -> Tensor:
    """(B, K, N, L) -> (B, L, K, N), in the order of the walk."""
    t = t.permute(0, 3, 1, 2)
    return t.flip(1) if reverse else t


def _unprojected(t: Tensor, reverse: bool) -> Tensor:
    t = t.flip(1) if reverse else t
    return t.permute(0, 2, 3, 1)
