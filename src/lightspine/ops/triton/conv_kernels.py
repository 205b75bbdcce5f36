"""Triton kernels of the causal depthwise 1D convolution with SiLU, for several directions at once.

Shapes: x (B, L, D), channels adjacent, shared by the K groups; weight (K, D, W) and bias (K, D),
contiguous; output and gradients (B, L, K, D). A group whose bit of `reversed_groups` is set reads the
W - 1 following positions instead of the preceding ones.
"""

# Triton's language is untyped; its branches are decided by the compiler.
# mypy: ignore-errors

import triton
import triton.language as tl

from lightspine.ops.triton.kernels import is_reversed, sigmoid

VARYING = ("length", "groups", "batch", "time_blocks", "reversed_groups")


@triton.jit
def load_positions(p_x, o_t, x_stride, o_d, in_d, length, DTYPE: tl.constexpr):
    """Load a (positions, channels) tile, zero outside the sequence."""
    inside = (o_t >= 0) & (o_t < length)
    p_tile = p_x + o_t.to(tl.int64)[:, None] * x_stride + o_d[None, :]
    return tl.load(p_tile, mask=inside[:, None] & in_d[None, :], other=0.0).to(DTYPE)


@triton.jit
def convolve(
    p_x, p_weight, p_bias, o_t, x_stride, o_d, in_d, length, back, W: tl.constexpr, DTYPE: tl.constexpr
):
    """Return the convolution before its activation at the positions `o_t`; `back` is 1, or -1 in reverse."""
    out = tl.zeros((o_t.shape[0], o_d.shape[0]), dtype=DTYPE)
    if p_bias is not None:
        out += tl.load(p_bias + o_d, mask=in_d, other=0.0).to(DTYPE)[None, :]
    for w in tl.static_range(W):
        tap = tl.load(p_weight + o_d * W + w, mask=in_d, other=0.0).to(DTYPE)
        x = load_positions(p_x, o_t - back * (W - 1 - w), x_stride, o_d, in_d, length, DTYPE)
        out += x * tap[None, :]
    return out


@triton.jit(do_not_specialize=VARYING)
def causal_conv1d_fwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    x_strides,
    length,
    groups,
    dim,
    time_blocks,
    reversed_groups,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute BLOCK_T positions of BLOCK_D channels of one group."""
    blocks = tl.cdiv(dim, BLOCK_D)
    i_task = tl.program_id(0).to(tl.int64)
    o_d = (i_task % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Groups that read the same tile of x follow one another.
    i_k = (i_task // blocks) % groups
    i_bt = i_task // blocks // groups
    i_b = i_bt // time_blocks
    o_t = (i_bt % time_blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_d = o_d < dim
    back = tl.where(is_reversed(i_k, reversed_groups), -1, 1)
    out = convolve(
        p_x + i_b * x_strides[0],
        p_weight + i_k * dim * W,
        None if p_bias is None else p_bias + i_k * dim,
        o_t,
        x_strides[1],
        o_d,
        in_d,
        length,
        back,
        W,
        DTYPE,
    )
    if SILU:
        out *= sigmoid(out)
    p_out += i_b * length * groups * dim + i_k * dim
    p_tile = p_out + o_t.to(tl.int64)[:, None] * (groups * dim) + o_d[None, :]
    tl.store(p_tile, out.to(p_out.dtype.element_ty), mask=(o_t < length)[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=VARYING)
def causal_conv1d_bwd_kernel(
    p_x,
    p_weight,
    p_bias,
    p_grad_out,
    p_grad_x,
    p_grad_parameters,
    x_strides,
    grad_out_strides,
    length,
    groups,
    dim,
    time_blocks,
    reversed_groups,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute the gradient of BLOCK_T positions of x, summed over the groups, and a part of the parameters'.

    The convolution before SiLU is recomputed at every position that depends on the tile of x. `p_grad_x` is
    contiguous; `p_grad_parameters` receives one row of sums over the tile, (B, time blocks, K, W + 1, D):
    the W taps, then the bias.
    """
    blocks = tl.cdiv(dim, BLOCK_D)
    i_task = tl.program_id(0).to(tl.int64)
    o_d = (i_task % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    i_bt = i_task // blocks
    i_b = i_bt // time_blocks
    o_t = (i_bt % time_blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_d = o_d < dim
    p_x += i_b * x_strides[0]
    p_grad_parameters += i_bt * groups * (W + 1) * dim
    grad_x = tl.zeros((BLOCK_T, BLOCK_D), dtype=DTYPE)
    i_k = 0
    while i_k < groups:
        back = tl.where(is_reversed(tl.full((), i_k, tl.int32), reversed_groups), -1, 1)
        q_weight = p_weight + i_k * dim * W
        q_bias = None if p_bias is None else p_bias + i_k * dim
        q_grad_out = p_grad_out + i_b * grad_out_strides[0] + i_k * grad_out_strides[2]
        q_parameters = p_grad_parameters + i_k * (W + 1) * dim + o_d
        for w in tl.static_range(W):
            # The position that x reaches through tap w.
            o_s = o_t + back * (W - 1 - w)
            grad = load_positions(q_grad_out, o_s, grad_out_strides[1], o_d, in_d, length, DTYPE)
            if SILU:
                y = convolve(p_x, q_weight, q_bias, o_s, x_strides[1], o_d, in_d, length, back, W, DTYPE)
                gate = sigmoid(y)
                grad *= gate * (1.0 + y * (1.0 - gate))
            tap = tl.load(q_weight + o_d * W + w, mask=in_d, other=0.0).to(DTYPE)
            grad_x += grad * tap[None, :]
            # A product of x at the tile with the gradient that it reaches: each pair once.
            x = load_positions(p_x, o_t, x_strides[1], o_d, in_d, length, DTYPE)
            tl.store(q_parameters + w * dim, tl.sum(grad * x, 0), mask=in_d)
            if w == W - 1:
                tl.store(q_parameters + W * dim, tl.sum(grad, 0), mask=in_d)
        i_k += 1
    p_tile = p_grad_x + (i_b * length + o_t)[:, None] * dim + o_d[None, :]
    tl.store(p_tile, grad_x.to(p_grad_x.dtype.element_ty), mask=(o_t < length)[:, None] & in_d[None, :])
