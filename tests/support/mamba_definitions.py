"""Plain definitions of what `lightspine.compat` offers, for any dtype, and random arguments for them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers that depend on the shape and the seed only."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


def define_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The recurrence of Mamba, one position after the other; B and C in any of their shapes."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (_per_channel(t, u) for t in (B, C))
    h = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def _per_channel(t: Tensor, u: Tensor) -> Tensor:
    """B or C as (B, D, N, L)."""
    if t.dim() == 2:
        return t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    t = t if t.dim() == 4 else t[:, None]
    return t.repeat_interleave(u.shape[1] // t.shape[1], dim=1)


def define_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    """The causal depthwise convolution."""
    reach = weight.shape[1] - 1
    out = F.conv1d(F.pad(x, (reach, 0)), weight[:, None], bias, groups=x.shape[1])
    return F.silu(out) if silu else out


def define_inner(
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
    A_b: Tensor | None = None,
) -> Tensor:
    """The inner part of Mamba's mixer: convolution, projections and scan, with `A_b` in both directions."""
    x, z = xz.chunk(2, dim=1)
    u = define_convolution(x, conv1d_weight[:, 0], conv1d_bias, silu=True)
    projected = x_proj_weight @ u
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    delta = delta_proj_weight @ projected[:, :rank]
    B = projected[:, rank : rank + states] if B is None else B
    C = projected[:, -states:] if C is None else C
    y = define_scan(u, delta, A, B, C, D, z, delta_bias, True)
    if A_b is None:
        return y
    flipped = (t.flip(-1) if t.dim() > 2 else t for t in (u, delta, A_b, B, C))
    return y + define_scan(*flipped, D, z.flip(-1), delta_bias, True).flip(-1)


def inner_arguments(
    batch: int = 2, dim: int = 6, length: int = 11, states: int = 3, rank: int = 2, width: int = 4
) -> dict[str, Tensor]:
    """Return the tensors that the `..._inner_fn` have in common, by their names."""
    return {
        "xz": draw(batch, 2 * dim, length),
        "conv1d_weight": draw(dim, 1, width),
        "conv1d_bias": draw(dim),
        "x_proj_weight": 0.3 * draw(rank + 2 * states, dim),
        "delta_proj_weight": draw(dim, rank),
        "A": -torch.exp(0.5 * draw(dim, states)),
        "D": draw(dim, seed=1),
        "delta_bias": draw(dim, seed=2) - 1,
    }


def values_and_gradients(function: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Return the output of a function and the gradients of its tensors, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), draw(*out.shape, seed=9).to(out))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
