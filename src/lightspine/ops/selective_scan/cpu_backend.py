"""The selective scan by the compiled CPU kernels: tokens are read and written where they lie."""

import functools

import numpy as np
import torch
from torch import Tensor

from lightspine.ops.cpu.launch import GroupedInputs, Strided, grouped_scan, grouped_scan_backward, readable
from lightspine.ops.selective_scan.checks import ScanInputs


def forward(
    inputs: ScanInputs, delta_softplus: bool, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, D, L), the last state (B, D, N) and, with `keep`, states for the backward."""
    grouped = _grouped(inputs, delta_softplus, reverse)
    out, out_rows = _empty_tokens(inputs.u, grouped)
    state, kept = grouped_scan(grouped, out_rows, keep)
    batch, dim, _ = out.shape
    return out, state.transpose(2, 3).reshape(batch, dim, -1), kept


def backward(
    grad_out: Tensor,
    grad_state: Tensor,
    inputs: ScanInputs,
    kept: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> ScanInputs:
    """Return the gradients of all inputs in their shapes and dtypes; `kept` is the forward's, or empty."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    grouped = _grouped(inputs, delta_softplus, reverse)
    groups = B.shape[1]
    grad_u, u_rows = _empty_tokens(u, grouped)
    grad_delta, delta_rows = _empty_tokens(delta, grouped)
    grad_z, z_rows = (None, None) if z is None else _empty_tokens(z, grouped)
    grads = grouped_scan_backward(
        _tokens(grad_out, grouped.dtype, groups),
        grad_state.to(grouped.dtype).unflatten(1, (groups, -1)).transpose(2, 3).contiguous(),
        grouped,
        kept,
        u_rows,
        delta_rows,
        z_rows,
    )
    return ScanInputs(
        grad_u,
        grad_delta,
        grads.A.flatten(0, 1).to(A.dtype),
        grads.B.permute(0, 2, 3, 1).to(B.dtype),
        grads.C.permute(0, 2, 3, 1).to(C.dtype),
        None if D is None else grads.D.flatten().to(D.dtype),
        grad_z,
        None if delta_bias is None else grads.delta_bias.flatten().to(delta_bias.dtype),
    )


@functools.lru_cache(maxsize=64)
def _walk(length: int, reverse: bool) -> np.ndarray:
    steps = np.arange(length)
    return np.ascontiguousarray(steps[::-1] if reverse else steps)[None]


def _grouped(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> GroupedInputs:
    u, delta, A, B, C, D, z, delta_bias = inputs
    batch, dim, length = u.shape
    groups, states = B.shape[1:3]
    dtype = torch.promote_types(u.dtype, torch.float32)
    return GroupedInputs(
        (batch, length, groups, dim // groups, states),
        dtype,
        _tokens(u, dtype, groups),
        _tokens(delta, dtype, groups),
        A.unflatten(0, (groups, -1)),
        _projection(B.to(dtype)),
        _projection(C.to(dtype)),
        D,
        None if z is None else _tokens(z, dtype, groups),
        delta_bias,
        delta_softplus,
        _walk(length, reverse),
    )


def _tokens(t: Tensor, dtype: torch.dtype, groups: int) -> Strided:
    """(B, D, L) as (B, L, K, D / K), channels adjacent."""
    t = readable(t.transpose(1, 2), dtype)
    return Strided(t, t.stride(0), t.stride(1), t.shape[2] // groups)


def _projection(t: Tensor) -> Strided:
    """(B, K, N, L) as (B, L, K, N)."""
    batch, group, state, position = t.stride()
    return Strided(t, batch, position, group, state)


def _empty_tokens(like: Tensor, inputs: GroupedInputs) -> tuple[Tensor, Strided]:
    """Return memory for a tensor (B, D, L), channels adjacent, as a tensor and as (B, L, K, D / K)."""
    batch, length, groups, dim, _ = inputs.sizes
    t = torch.empty(batch, length, groups * dim, dtype=like.dtype)
    return t.transpose(1, 2), Strided(t, length * groups * dim, groups * dim, dim)
