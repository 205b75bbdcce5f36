"""Triton kernel of a layer norm or RMS norm over the channels, with the residual addition before it.

Tensors are (rows, channels), contiguous. Each program normalizes BLOCK_R whole rows.
"""

# Triton's language is untyped; its branches are decided by the compiler.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows",))
def add_norm_kernel(
    p_x,
    p_update,
    p_weight,
    p_bias,
    p_sum,
    p_out,
    rows,
    dim,
    eps,
    RMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Store x + update, unless there is none, and its norm; sums are computed in DTYPE."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    in_c = o_c < dim
    inside = (o_r < rows)[:, None] & in_c[None, :]
    offsets = o_r[:, None] * dim + o_c[None, :]
    x = tl.load(p_x + offsets, mask=inside, other=0.0).to(DTYPE)
    if p_update is not None:
        x += tl.load(p_update + offsets, mask=inside, other=0.0).to(DTYPE)
        # The norm is that of the stored sum.
        rounded = x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + offsets, rounded, mask=inside)
        x = rounded.to(DTYPE)
    if not RMS:
        mean = tl.sum(x, axis=1) / dim
        x = tl.where(in_c[None, :], x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / dim + eps)
    y = x * scale[:, None] * tl.load(p_weight + o_c, mask=in_c, other=0.0).to(DTYPE)[None, :]
    if p_bias is not None:
        y += tl.load(p_bias + o_c, mask=in_c, other=0.0).to(DTYPE)[None, :]
    tl.store(p_out + offsets, y.to(p_out.dtype.element_ty), mask=inside)
