"""Reference implementations: the plain loops that define both scans, for any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.ops.scan_orders import scan_order


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Selective scan (Mamba, section 3.2) as a loop over the sequence; every backend is tested against it.

    Args:
        u: input, (B, D, L).
        delta: dt before bias and softplus, (B, D, L).
        A: state matrix, negative, (D, N).
        B: input projection, (B, K, N, L); channel d reads group d // (D / K).
        C: output projection, (B, K, N, L).
        D: skip connection, (D,).
        z: gate, (B, D, L); the output is multiplied by SiLU(z).
        delta_bias: added to delta, (D,).
        delta_softplus: apply softplus to dt.
        reverse: scan from the last position to the first.

    Returns:
        The output (B, D, L) in the dtype of `u`, and the last state (B, D, N) in float32 (float64 for
        float64).
    """
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    dim, groups = u.shape[1], B.shape[1]
    x, dt = u.to(state_dtype), delta.to(state_dtype)
    A, B, C = A.to(state_dtype), B.to(state_dtype), C.to(state_dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(state_dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    B = B.repeat_interleave(dim // groups, dim=1)  # (B, D, N, L)
    C = C.repeat_interleave(dim // groups, dim=1)

    length = u.shape[-1]
    state = x.new_zeros(u.shape[0], dim, A.shape[1])
    outputs: list[Tensor] = [x[..., 0]] * length
    for t in range(length - 1, -1, -1) if reverse else range(length):
        decay = torch.exp(dt[:, :, t, None] * A)
        state = decay * state + (dt[:, :, t] * x[:, :, t])[..., None] * B[..., t]
        outputs[t] = (state * C[..., t]).sum(-1)
    out = torch.stack(outputs, dim=-1)
    if D is not None:
        out = out + x * D.to(state_dtype)[:, None]
    if z is not None:
        out = out * F.silu(z.to(state_dtype))
    return out.to(u.dtype), state


def cross_scan_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    order: str = "cross2d",
) -> Tensor:
    """Scan of a feature map in K directions (VMamba, section 4.2): gather, scan, scatter and sum.

    Every backend is tested against it.

    Args:
        x: feature map, (B, H, W, D), shared by the K directions.
        delta: dt in pixel order before bias and softplus, (B, H, W, K, D).
        A: state matrices, negative, (K, D, N).
        B: input projections in pixel order, (B, H, W, K, N).
        C: output projections in pixel order, (B, H, W, K, N).
        D: skip connections, (K, D).
        delta_bias: added to delta, (K, D).
        delta_softplus: apply softplus to dt.
        order: registered scan order with K directions.

    Returns:
        The sum over directions, (B, H, W, D), float32 for reduced-precision input, else the dtype of `x`.
    """
    batch, height, width, dim = x.shape
    groups, length = delta.shape[3], height * width
    pixels = scan_order(order, height, width).to(x.device)  # (K, L)
    out_dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(batch, length, dim, dtype=out_dtype, device=x.device)
    for k in range(groups):
        index = pixels[k]
        scanned, _ = selective_scan_reference(
            x.reshape(batch, length, dim)[:, index].transpose(1, 2).to(out_dtype),
            delta[:, :, :, k].reshape(batch, length, dim)[:, index].transpose(1, 2),
            A[k],
            B[:, :, :, k].flatten(1, 2)[:, index].transpose(1, 2)[:, None],
            C[:, :, :, k].flatten(1, 2)[:, index].transpose(1, 2)[:, None],
            None if D is None else D[k],
            None,
            None if delta_bias is None else delta_bias[k],
            delta_softplus,
        )
        total = total.index_add(1, index, scanned.transpose(1, 2))
    return total.view(batch, height, width, dim)
