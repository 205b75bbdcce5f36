"""The selective scan as it is defined: one Python loop over the sequence, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Define the operator (Mamba, section 3.2); every backend is judged against this function.

    Args:
        u: input, (B, D, L).
        delta: step before bias and softplus, (B, D, L).
        A: state matrix, negative, (D, N).
        B: input projection, (B, K, N, L); channel d reads group d // (D / K).
        C: output projection, (B, K, N, L).
        D: skip, (D,).
        z: gate, (B, D, L); the output is multiplied by SiLU(z).
        delta_bias: added to delta, (D,).
        delta_softplus: pass the step through softplus.
        reverse: walk from the last position to the first.

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
