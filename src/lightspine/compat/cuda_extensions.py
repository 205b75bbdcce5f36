"""`fwd` and `bwd` of the extension modules of mamba_ssm and VMamba: scan and gradients without autograd.

VMamba, its forks and copies of mamba_ssm call these functions inside autograd functions of their own. The
modules differ only in their arguments. Shapes are those of `lightspine.compat.selective_scan`.
"""

# The kernels that these functions replace have tuning parameters and saved states.
# ruff: noqa: ARG001

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.compat.checks import check_real, in_layout_of
from lightspine.errors import UsageError
from lightspine.ops.inputs import state_dtype
from lightspine.ops.selective_scan import grouped_projections, selective_scan

# Positions per saved state in the kernels of mamba_ssm and VMamba.
_CHUNK = 2048


class Gradients(NamedTuple):
    """Gradients of a scan, each in the shape and dtype of its tensor.

    Attributes:
        u: (B, D, L).
        delta: (B, D, L).
        A: (D, N).
        B: in the shape of B.
        C: in the shape of C.
        D: (D,).
        z: (B, D, L).
        delta_bias: (D,).
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


def mamba_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """Selective scan, with the signature of mamba_ssm's `selective_scan_cuda.fwd`.

    Returns the output before the gate, the states, and with `z` the gated output.

    mamba_ssm fills the states (B, D, chunks, 2 N) for its own `bwd`. Here they hold only the last state, at
    `[:, :, -1, 1::2]`, and zeros.

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    precise = u if z is None else u.to(state_dtype(u.dtype))
    out, states = scan_forward(
        "selective_scan_cuda.fwd", precise, delta, A, B, C, D, delta_bias, delta_softplus
    )
    if z is None:
        return [out, states]
    gated = (out * F.silu(z.to(out.dtype))).to(z.dtype)
    return [out.to(u.dtype), states, gated]


def mamba_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """Gradients of the selective scan, with the signature of mamba_ssm's `selective_scan_cuda.bwd`.

    Returns the gradients of all tensors, that of z last, then the gated output with
    `recompute_out_z`. The states are recomputed: `x` is not read.

    Args:
        u: like all tensors up to `delta_bias`, as in the forward.
        delta: see there.
        A: see there.
        B: see there.
        C: see there.
        D: see there.
        z: see there.
        delta_bias: see there.
        dout: gradient of the gated output, (B, D, L).
        x: states from the forward.
        out: output before the gate, from the forward; read only for `recompute_out_z`.
        dz: receives the gradient of z if it is given.
        delta_softplus: as in the forward.
        recompute_out_z: append the gated output.

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    grads = scan_backward(
        "selective_scan_cuda.bwd", u, delta, A, B, C, D, z, delta_bias, dout, delta_softplus
    )
    results: list[Tensor | None] = [*grads[:6], grads.delta_bias]
    if z is not None and grads.z is not None:
        results.append(grads.z if dz is None else dz.copy_(grads.z))
    if recompute_out_z:
        if z is None or out is None:
            raise UsageError("selective_scan_cuda.bwd expects z and out where recompute_out_z is set")
        precise = state_dtype(out.dtype)
        results.append((out.to(precise) * F.silu(z.to(precise))).to(out.dtype))
    return results


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """Selective scan, with the signature of VMamba's `selective_scan_cuda_core.fwd` and `_nrow`.

    Returns the output, in the dtype of u, and the states of `mamba_fwd`.

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    return [*scan_forward("selective_scan_cuda_core.fwd", u, delta, A, B, C, D, delta_bias, delta_softplus)]


def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """Selective scan, with the signature of VMamba's `selective_scan_cuda_oflex.fwd`.

    Returns the same as `core_fwd`, with `out_float` in at least float32.

    delta and delta_bias may have D / r channels, each of which belongs to r neighboring channels of u.

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    if out_float:
        u = u.to(state_dtype(u.dtype))
    return [*scan_forward("selective_scan_cuda_oflex.fwd", u, delta, A, B, C, D, delta_bias, delta_softplus)]


def core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """Gradients of the selective scan, with the signature of `bwd` of VMamba's three modules.

    Returns the gradients of u, delta, A, B, C, D and delta_bias. The states are recomputed: `x` is not read.

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    name = "selective_scan_cuda_core.bwd"
    grads = scan_backward(name, u, delta, A, B, C, D, None, delta_bias, dout, delta_softplus)
    return [*grads[:6], grads.delta_bias]


def ndstate_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """Selective scan with one state, with the signature of `selective_scan_cuda_ndstate.fwd`.

    The state has no axis: A is (D,), B and C are (B, G, L).

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    name = "selective_scan_cuda_ndstate.fwd"
    A, B, C = _with_state_axis(name, A, B, C)
    return [*scan_forward(name, u, delta, A, B, C, D, delta_bias, delta_softplus)]


def ndstate_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """Gradients of the scan with one state, with the signature of `selective_scan_cuda_ndstate.bwd`.

    Returns the gradients in the shapes of the arguments.

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    name = "selective_scan_cuda_ndstate.bwd"
    A, B, C = _with_state_axis(name, A, B, C)
    grads = scan_backward(name, u, delta, A, B, C, D, None, delta_bias, dout, delta_softplus)
    A_and_more = [grads.A.squeeze(1), grads.B.squeeze(2), grads.C.squeeze(2)]
    return [grads.u, grads.delta, *A_and_more, grads.D, grads.delta_bias]


def _with_state_axis(name: str, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if A.dim() != 1 or B.dim() != 3 or C.dim() != 3:
        raise UsageError(
            f"{name} expects A of shape (D,), B and C of shape (B, G, L), received {tuple(A.shape)}, "
            f"{tuple(B.shape)} and {tuple(C.shape)}"
        )
    return A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)


def scan_forward(
    name: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Scan without a gate; return the output (B, D, L) in the dtype of u, and the states of `mamba_fwd`."""
    check_real(name, A)
    delta, delta_bias, _ = _repeat_delta(name, u, delta, delta_bias)
    out, state = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, True)
    batch, dim, length = u.shape
    states = state.new_zeros(batch, dim, -(-length // _CHUNK), 2 * A.shape[1])
    states[:, :, -1, 1::2] = state
    return in_layout_of(out, u), states


def scan_backward(
    name: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    delta_softplus: bool,
) -> Gradients:
    """Return the gradients of a scan with an optional gate, given that of its output, (B, D, L)."""
    check_real(name, A)
    step, step_bias, repeats = _repeat_delta(name, u, delta, delta_bias)
    if dout.shape != u.shape:
        raise UsageError(f"{name} expects dout of shape {tuple(u.shape)}, received {tuple(dout.shape)}")
    B_groups, C_groups = grouped_projections(u, A, B, C)
    # The output, whose gradient this is, may be float32 where u has 16 bits.
    x = u.to(torch.promote_types(u.dtype, dout.dtype))
    no_state = A.new_zeros(u.shape[0], *A.shape, dtype=state_dtype(x.dtype))
    du, ddelta, dA, dB, dC, dD, dz, dbias = torch.ops.lightspine.selective_scan_backward(
        dout,
        no_state,
        x,
        step,
        A,
        B_groups,
        C_groups,
        D,
        z,
        step_bias,
        x.new_empty(0),
        delta_softplus,
        False,
        "auto",
    )
    if repeats > 1:
        ddelta, dbias = ddelta.unflatten(1, (-1, repeats)).sum(2), dbias.view(-1, repeats).sum(1)
    return Gradients(
        in_layout_of(du.to(u.dtype), u),
        in_layout_of(ddelta, delta),
        dA,
        _projection_gradient(dB, B),
        _projection_gradient(dC, C),
        None if D is None else dD,
        None if z is None else in_layout_of(dz, z),
        None if delta_bias is None else dbias,
    )


def _repeat_delta(
    name: str, u: Tensor, delta: Tensor, delta_bias: Tensor | None
) -> tuple[Tensor, Tensor | None, int]:
    """Repeat delta and its bias for every channel of u; return them and how many channels share one."""
    if u.dim() != 3 or delta.dim() != 3 or delta.shape[1] == 0 or u.shape[1] % delta.shape[1]:
        raise UsageError(
            f"{name} expects u of shape (B, D, L) and delta of shape (B, D, L) or (B, D / r, L), received "
            f"{tuple(u.shape)} and {tuple(delta.shape)}"
        )
    repeats = u.shape[1] // delta.shape[1]
    if repeats > 1:
        delta = delta.repeat_interleave(repeats, dim=1)
        delta_bias = None if delta_bias is None else delta_bias.repeat_interleave(repeats)
    return delta, delta_bias, repeats


def _projection_gradient(grad: Tensor, projection: Tensor) -> Tensor:
    """Sum a gradient (B, K, N, L) to the shape of B or C, which `grouped_projections` has expanded."""
    if projection.dim() == 2:
        return grad.sum((0, 3))
    if projection.dim() == 4:
        grad = grad.unflatten(1, (projection.shape[1], -1)).sum(2)
    return grad.reshape(projection.shape).contiguous()
