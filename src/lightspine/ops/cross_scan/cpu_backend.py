"""The scan over a map by the compiled CPU kernels: every direction walks the map where it lies."""

import torch
from torch import Tensor

from lightspine.ops.cpu.launch import GroupedInputs, Strided, grouped_scan, grouped_scan_backward, readable
from lightspine.ops.cross_scan.checks import CrossScanInputs, check_directions
from lightspine.ops.scan_orders import scan_order


def forward(inputs: CrossScanInputs, delta_softplus: bool, order: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the sum over the directions, (B, H, W, D), and, with `keep`, states for the backward.

    Both are in the dtype of the state.
    """
    grouped = _grouped(inputs, delta_softplus, order)
    out = torch.empty(inputs.x.shape, dtype=grouped.dtype)
    _, kept = grouped_scan(grouped, _shared(out, grouped.dtype), keep)
    return out, kept


def forward_projected(inputs: CrossScanInputs, step_weight: Tensor, order: str) -> Tensor:
    """Return the sum over the directions, (B, H, W, D), in the dtype of the state.

    Args:
        inputs: with R numbers in place of the D steps in `delta`, (B, H, W, K, R).
        step_weight: maps them to steps, (K, R, D).
        order: registered scan order.
    """
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    grouped = _grouped(inputs, True, order)._replace(step_weight=step_weight.to(dtype).contiguous())
    out = torch.empty(inputs.x.shape, dtype=dtype)
    grouped_scan(grouped, _shared(out, dtype), False)
    return out


def backward(
    grad_out: Tensor, inputs: CrossScanInputs, kept: Tensor, delta_softplus: bool, order: str
) -> CrossScanInputs:
    """Return the gradients of all inputs in their shapes and dtypes; `kept` is the forward's, or empty."""
    x, delta, A, B, C, D, delta_bias = inputs
    grouped = _grouped(inputs, delta_softplus, order)
    # The directions are added up in the precision of the state and rounded once.
    grad_x = torch.empty(x.shape, dtype=grouped.dtype)
    grad_delta = torch.empty(delta.shape, dtype=delta.dtype)
    grads = grouped_scan_backward(
        _shared(grad_out, grouped.dtype),
        None,
        grouped,
        kept,
        _shared(grad_x, grouped.dtype),
        _per_direction(grad_delta),
        None,
    )
    return CrossScanInputs(
        grad_x.to(x.dtype),
        grad_delta,
        grads.A.to(A.dtype),
        grads.B.view(B.shape).to(B.dtype),
        grads.C.view(C.shape).to(C.dtype),
        None if D is None else grads.D.to(D.dtype),
        None if delta_bias is None else grads.delta_bias.to(delta_bias.dtype),
    )


def _grouped(inputs: CrossScanInputs, delta_softplus: bool, order: str) -> GroupedInputs:
    x, delta, A, B, C, D, delta_bias = inputs
    batch, height, width, dim = x.shape
    groups, _, states = A.shape
    walk = scan_order(order, height, width).numpy()
    check_directions(groups, walk.shape[0], order)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return GroupedInputs(
        (batch, height * width, groups, dim, states),
        dtype,
        _shared(x, dtype),
        _per_direction(readable(delta, dtype)),
        A,
        _per_direction(B.to(dtype)),
        _per_direction(C.to(dtype)),
        D,
        None,
        delta_bias,
        delta_softplus,
        walk,
    )


def _shared(t: Tensor, dtype: torch.dtype) -> Strided:
    """(B, H, W, D) as (B, L, K, D) that all groups share, channels adjacent."""
    t = _in_rows(readable(t, dtype))
    return Strided(t, t.stride(0), _position_stride(t), 0)


def _per_direction(t: Tensor) -> Strided:
    """(B, H, W, K, X) as (B, L, K, X)."""
    t = _in_rows(t)
    return Strided(t, t.stride(0), _position_stride(t), t.stride(3), t.stride(4))


def _in_rows(t: Tensor) -> Tensor:
    """Return `t` with one stride from each pixel to the next, row by row."""
    height, width = t.shape[1:3]
    return t if height == 1 or width == 1 or t.stride(1) == width * t.stride(2) else t.contiguous()


def _position_stride(t: Tensor) -> int:
    return t.stride(2 if t.shape[2] > 1 else 1)
