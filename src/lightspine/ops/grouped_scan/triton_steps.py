"""What every Triton kernel of the scan needs: where a program works, its steps, and exp's relatives.

Names in the kernels: `i_*` index, `o_*` offsets, `p_*` pointer, `b_*` block in registers; b image, k group,
j chunk, d channels, n states, t step of the walk. A program is one warp. It holds BLOCK_D channels with all
their states, (BLOCK_N, BLOCK_D), and takes TILE steps at a time in straight code, so that the reads of a
whole tile are under way at once. Indices are 64 bits wide before they meet a stride.
"""

# Kernels are written in Triton's language: untyped, no starred tuples, branches of the compiler.
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

# Numbers that change between images and between launches: none of them gets a compiled kernel of its own.
CHANGING = ("length", "groups", "batch", "chunk", "chunks", "first", "first_group", "launched")


@triton.jit
def locate(first, dim, chunks, first_group, launched, BLOCK_D: tl.constexpr):
    """Return the image, group, chunk and block of channels of this program; neighbours share a chunk."""
    i_task = tl.program_id(0).to(tl.int64) + first
    blocks = tl.cdiv(dim, BLOCK_D)
    i_rest = i_task // blocks
    i_group = i_rest // chunks
    return i_group // launched, first_group + i_group % launched, i_rest % chunks, i_task % blocks


@triton.jit
def visit(p_order, i_k, i_t, stop, length, dim, states, REVERSE: tl.constexpr, TILE: tl.constexpr):
    """Return, for each of the TILE steps from i_t on, its position and the channels and states it may touch.

    A step at or beyond `stop` may touch none, but its position is a valid one.
    """
    positions = ()
    dims = ()
    counts = ()
    for s in tl.static_range(TILE):
        i_s = tl.minimum(i_t + s, length - 1)
        if p_order is not None:
            i_p = tl.load(p_order + i_k * length + i_s).to(tl.int64)
        elif REVERSE:
            i_p = length - 1 - i_s
        else:
            i_p = i_s
        positions = positions + (i_p,)
        dims = dims + (tl.where(i_t + s < stop, dim, 0),)
        counts = counts + (tl.where(i_t + s < stop, states, 0),)
    return positions, dims, counts


@triton.jit
def load_rows(p_rows, stride, positions, dims, o_d, STATE: tl.constexpr, TILE: tl.constexpr):
    """Return the channels at each position, widened to STATE at once, zero where they may not be touched."""
    rows = ()
    for s in tl.static_range(TILE):
        row = tl.load(p_rows + positions[s] * stride + o_d, mask=o_d < dims[s], other=0.0)
        rows = rows + (row.to(STATE),)
    return rows


@triton.jit
def step_sizes(b_raws, b_bias, dims, o_d, DELTA_SOFTPLUS: tl.constexpr, TILE: tl.constexpr):
    """Return delta with its bias, and through softplus, where asked for; zero for a step that is none."""
    steps = ()
    for s in tl.static_range(TILE):
        b_dt = b_raws[s] + b_bias
        if DELTA_SOFTPLUS:
            b_dt = softplus(b_dt)
        # A step of zero keeps the state.
        steps = steps + (tl.where(o_d < dims[s], b_dt, 0.0),)
    return steps


@triton.jit
def load_channels(p_row, o_d, dim, BLOCK_D: tl.constexpr, STATE: tl.constexpr):
    """Return one row of channels, zeros where there is no such row."""
    if p_row is not None:
        return tl.load(p_row + o_d, mask=o_d < dim, other=0.0)
    else:
        return tl.zeros((BLOCK_D,), dtype=STATE)


@triton.jit
def softplus(x):
    """Return log(1 + e^x); x itself above 20, as PyTorch does."""
    small = tl.exp(-tl.abs(x))
    # Where 1 + small loses most of a small number, its logarithm is scaled by what it lost.
    whole = 1.0 + small
    arrived = whole - 1.0
    logarithm = tl.where(
        arrived > 0.0, tl.log(whole) * (small / tl.where(arrived > 0.0, arrived, 1.0)), small
    )
    return tl.where(x > 20.0, x, tl.where(x > 0.0, x, 0.0) + logarithm)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^-x); no exponential of a positive number is taken, so none overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)
