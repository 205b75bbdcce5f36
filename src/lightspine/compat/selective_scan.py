"""The functions of `mamba_ssm.ops.selective_scan_interface`, on lightspine's operators.

Shapes are those of mamba_ssm: sequences (B, D, L), state matrices (D, N), and projections B and C of shape
(B, N, L), (B, G, N, L) in G groups of channels, or constant, (D, N). The state, A and dt are float32 (float64
for float64 input), also under autocast.
"""

import functools

import torch.nn.functional as F
from torch import Tensor

from lightspine.compat.causal_conv1d import convolve
from lightspine.compat.checks import autocast_dtype, check_real, check_shape, in_layout_of
from lightspine.compat.norms import rms_norm_fn
from lightspine.errors import UsageError
from lightspine.layers.checkpointing import checkpoint_scan
from lightspine.ops.selective_scan import grouped_projections, scan, selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of Mamba, as `mamba_ssm`'s function of this name: `lightspine.ops.selective_scan`.

    Args:
        u: input, (B, D, L).
        delta: dt before bias and softplus, (B, D, L).
        A: real state matrix, (D, N).
        B: input projection: (B, N, L), (B, G, N, L), or constant, (D, N).
        C: output projection, in one of the shapes of B.
        D: skip connection, (D,).
        z: gate, (B, D, L): the output is multiplied by SiLU(z).
        delta_bias: added to delta, (D,).
        delta_softplus: apply softplus to delta after its bias.
        return_last_state: also return the state after the last position.

    Returns:
        The output (B, D, L) in the dtype of u; with `return_last_state` also the state (B, D, N). As in
        mamba_ssm, no gradient flows through the state.

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    check_real("selective_scan_fn", A)
    out, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
    out = in_layout_of(out, u)
    return (out, state.detach()) if return_last_state else out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` as a plain loop over the positions; gradients flow through the state too."""
    check_real("selective_scan_ref", A)
    return selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend="reference"
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Mamba's mixer without its input projection: convolution, SiLU, projections, gated scan, projection.

    Under autocast the projection weights are cast to its dtype, as in mamba_ssm; the convolution and the scan
    compute in float32.

    Args:
        xz: input and gate, (B, 2 D, L).
        conv1d_weight: filters of the causal depthwise convolution, (D, 1, W).
        conv1d_bias: (D,).
        x_proj_weight: projection to dt, B and C, (R + 2 N, D); without the rows of B or C that are given.
        delta_proj_weight: projection of dt, (D, R).
        out_proj_weight: output projection, (C, D).
        out_proj_bias: (C,).
        A: real state matrix, (D, N).
        B: input projection, as in `selective_scan_fn`; `None`: projected from the input.
        C: output projection; `None`: projected from the input.
        D: skip connection, (D,).
        delta_bias: bias of dt, (D,).
        B_proj_bias: added to the projected B, (N,).
        C_proj_bias: added to the projected C, (N,).
        delta_softplus: apply softplus to dt.
        checkpoint_lvl: 1 recomputes everything but the scan in the backward pass, 0 nothing.
        b_rms_weight: weight of an RMSNorm of the projected B, (N,).
        c_rms_weight: weight of an RMSNorm of the projected C, (N,).
        dt_rms_weight: weight of an RMSNorm of dt before its bias, (D,).
        b_c_dt_rms_eps: epsilon of these norms.

    Returns:
        The output tokens, (B, L, C).

    Raises:
        UsageError: a complex A, or shapes, dtypes or devices that do not fit.
    """
    y = scan_projected(
        "mamba_inner_fn",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        None,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
        delta_softplus=delta_softplus,
        eps=b_c_dt_rms_eps,
        checkpoint=check_level("mamba_inner_fn", checkpoint_lvl),
    )
    return project_out(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """`mamba_inner_fn` without the output projection, as in Vim; returns (B, D, L)."""
    y = scan_projected(
        "mamba_inner_fn_no_out_proj",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        None,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus=delta_softplus,
        checkpoint=check_level("mamba_inner_fn_no_out_proj", checkpoint_lvl),
    )
    return in_layout_of(y, xz)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
) -> Tensor:
    """`mamba_inner_fn` plus a scan of the same projections in the opposite direction, as in Vim "v1".

    `A_b` is the state matrix of the second scan, (D, N). The two gated outputs are added before the output
    projection.
    """
    check_real("bimamba_inner_fn", A_b)
    y = scan_projected(
        "bimamba_inner_fn",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        A_b,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus=delta_softplus,
        checkpoint=check_level("bimamba_inner_fn", checkpoint_lvl),
    )
    return project_out(y, out_proj_weight, out_proj_bias)


def check_level(function: str, level: int) -> bool:
    """Return whether a function recomputes what precedes its scan in the backward pass.

    Raises:
        UsageError: the level is neither 0 nor 1.
    """
    if level not in (0, 1):
        raise UsageError(f"{function} expects checkpoint_lvl 0 or 1, received {level!r}")
    return level == 1


def project_out(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply the output projection to (B, D, L); returns tokens (B, L, C)."""
    dtype = autocast_dtype(y)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(y.transpose(1, 2), weight, bias)


def scan_projected(
    function: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    A_b: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    eps: float = 1e-6,
    checkpoint: bool = True,
    reverse: bool = False,
) -> Tensor:
    """Convolve, project, scan and gate: what the `..._inner_fn` have in common.

    Args:
        function: name for messages.
        xz: like all tensors that follow, as in `mamba_inner_fn`.
        conv1d_weight: see there.
        conv1d_bias: see there.
        x_proj_weight: see there.
        delta_proj_weight: see there.
        A: see there.
        A_b: state matrix of a scan of the same projections in the opposite direction, which is added.
        B: see there.
        C: see there.
        D: see there.
        delta_bias: see there.
        B_proj_bias: see there.
        C_proj_bias: see there.
        b_rms_weight: see there.
        c_rms_weight: see there.
        dt_rms_weight: see there.
        delta_softplus: see there.
        eps: epsilon of the norms.
        checkpoint: recompute everything but the scan in the backward pass.
        reverse: run the convolution and the scan from the last position to the first.

    Returns:
        The gated output, (B, D, L).

    Raises:
        UsageError: a complex A, or shapes that do not fit.
    """
    _check_weights(function, xz, conv1d_weight, x_proj_weight, delta_proj_weight, A, B is None, C is None)
    run = functools.partial(_scan_projected, delta_softplus, eps, reverse, checkpoint)
    arguments = (
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        A_b,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
    )
    return checkpoint_scan(run, *arguments) if checkpoint else run(*arguments)


def _check_weights(
    function: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    projects_B: bool,
    projects_C: bool,
) -> None:
    check_real(function, A)
    if xz.dim() != 3 or xz.shape[1] % 2:
        raise UsageError(f"{function} expects xz of shape (B, 2 D, L), received {tuple(xz.shape)}")
    dim = xz.shape[1] // 2
    for name, tensor, axes in (("A", A, "(D, N)"), ("delta_proj_weight", delta_proj_weight, "(D, R)")):
        if tensor.dim() != 2:
            raise UsageError(f"{function} expects {name} of shape {axes}, received {tuple(tensor.shape)}")
    width = conv1d_weight.shape[-1] if conv1d_weight.dim() == 3 else 4
    check_shape(function, "conv1d_weight", conv1d_weight, (dim, 1, width), "(D, 1, W)")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    check_shape(function, "delta_proj_weight", delta_proj_weight, (dim, rank), "(D, R)")
    rows = rank + states * (projects_B + projects_C)
    axes = "(R + 2 N, D)" if projects_B and projects_C else "(R + N, D)" if rows > rank else "(R, D)"
    check_shape(function, "x_proj_weight", x_proj_weight, (rows, dim), axes)


def _scan_projected(
    delta_softplus: bool,
    eps: float,
    reverse: bool,
    checkpoint: bool,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    A_b: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    b_rms_weight: Tensor | None,
    c_rms_weight: Tensor | None,
    dt_rms_weight: Tensor | None,
) -> Tensor:
    dtype = autocast_dtype(xz)
    if dtype is not None:
        x_proj_weight, delta_proj_weight = x_proj_weight.to(dtype), delta_proj_weight.to(dtype)
    x, z = xz.chunk(2, dim=1)
    u = convolve(x, conv1d_weight.squeeze(1), conv1d_bias, silu=True, reverse=reverse)
    projected = F.linear(u.transpose(1, 2), x_proj_weight)  # (B, L, R + 2 N)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = rms_norm_fn(delta, dt_rms_weight, None, eps=eps)
    if B is None:
        B = _projection(projected[..., rank : rank + states], B_proj_bias, b_rms_weight, eps)
    if C is None:
        C = _projection(projected[..., -states:], C_proj_bias, c_rms_weight, eps)
    B, C = grouped_projections(u, A, B, C)
    # Checkpointing skips the scan when it recomputes the rest, so that no states can be saved for it.
    keep = not checkpoint
    y = scan(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states=keep)
    if A_b is None:
        return y
    back = not reverse
    return y + scan(
        u, delta.transpose(1, 2), A_b, B, C, D, z, delta_bias, delta_softplus, back, save_states=keep
    )


def _projection(t: Tensor, bias: Tensor | None, rms_weight: Tensor | None, eps: float) -> Tensor:
    """Map projected tokens (B, L, N) to (B, N, L)."""
    if bias is not None:
        t = t + bias.to(t.dtype)
    if rms_weight is not None:
        t = rms_norm_fn(t, rms_weight, None, eps=eps)
    return t.transpose(1, 2)
