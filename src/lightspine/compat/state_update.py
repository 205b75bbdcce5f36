"""One step of the selective scan, as `mamba_ssm.ops.triton.selective_state_update`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.compat.checks import check_real, check_shape
from lightspine.errors import UsageError


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance the selective scan by one position and change its state in place; has no gradient.

    The step computes in float32 (float64 for float64 input). H heads with their own D channels are an extra
    axis after that of the batch; without it there is one head.

    Args:
        state: (B, D, N) or (B, H, D, N); changed in place.
        x: input, (B, D) or (B, H, D).
        dt: step size before bias and softplus, in the shape of x.
        A: real state matrix, (D, N) or (H, D, N).
        B: input projection, (B, N) or (B, G, N); head h reads group h // (H / G).
        C: output projection, in the shape of B.
        D: skip connection, (D,) or (H, D).
        z: gate, in the shape of x: the output is multiplied by SiLU(z).
        dt_bias: added to dt, in the shape of D.
        dt_softplus: apply softplus to dt after its bias.
        state_batch_indices: row of `state` that belongs to each sequence, (B,).

    Returns:
        The output in the shape and dtype of x.

    Raises:
        UsageError: a complex A, or shapes that do not fit.
    """
    name = "selective_state_update"
    check_real(name, A)
    if state.dim() not in (3, 4):
        raise UsageError(
            f"{name} expects state of shape (B, D, N) or (B, H, D, N), received {tuple(state.shape)}"
        )
    given = x.shape
    full = state if state.dim() == 4 else state[:, None]
    x, dt, B, C = (t[:, None] if t.dim() == 2 else t for t in (x, dt, B, C))
    z = z[:, None] if z is not None and z.dim() == 2 else z
    A = A[None] if A.dim() == 2 else A
    D, dt_bias = (t[None] if t is not None and t.dim() == 1 else t for t in (D, dt_bias))
    rows, heads, dim, states = full.shape
    batch = rows if state_batch_indices is None else x.shape[0]
    groups = B.shape[1] if B.dim() == 3 and B.shape[1] and heads % B.shape[1] == 0 else 1
    for label, tensor, shape, axes in (
        ("x", x, (batch, heads, dim), "(B, H, D)"),
        ("dt", dt, (batch, heads, dim), "(B, H, D)"),
        ("z", z, (batch, heads, dim), "(B, H, D)"),
        ("A", A, (heads, dim, states), "(H, D, N)"),
        ("B", B, (batch, groups, states), "(B, G, N)"),
        ("C", C, (batch, groups, states), "(B, G, N)"),
        ("D", D, (heads, dim), "(H, D)"),
        ("dt_bias", dt_bias, (heads, dim), "(H, D)"),
        ("state_batch_indices", state_batch_indices, (batch,), "(B,)"),
    ):
        check_shape(name, label, tensor, shape, axes)

    dtype = torch.promote_types(x.dtype, torch.float32)
    u, step = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    B, C = (t.to(dtype).repeat_interleave(heads // groups, dim=1)[:, :, None] for t in (B, C))
    index = None if state_batch_indices is None else state_batch_indices.long()
    before = (full if index is None else full[index]).to(dtype)
    after = torch.exp(step[..., None] * A.to(dtype)) * before + (step * u)[..., None] * B
    if index is None:
        full.copy_(after)
    else:
        full[index] = after.to(full.dtype)
    out = (after * C).sum(-1)
    if D is not None:
        out = out + u * D.to(dtype)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype).reshape(given)
