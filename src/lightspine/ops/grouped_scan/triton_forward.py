"""The forward kernels in Triton; names as in `triton_steps`, the algorithm is drawn in README.md.

Every tensor of a sequence, (B, L, K, D) or (B, L, K, N), comes as a pointer and its strides in elements;
channels are adjacent. What belongs to chunks is contiguous, in the dtype of the state: states
(B, K, J, N, D), sums of steps (B, K, J, D). An optional tensor that is not given is None.
"""

# Kernels are written in Triton's language: untyped, no starred tuples, branches of the compiler.
# mypy: ignore-errors
# ruff: noqa: C901, RUF005

import triton
import triton.language as tl

from lightspine.ops.grouped_scan.triton_steps import (
    CHANGING,
    load_channels,
    load_rows,
    locate,
    sigmoid,
    step_sizes,
    visit,
)


@triton.jit(do_not_specialize=CHANGING)
def scan_kernel(
    p_x,
    p_delta,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_z,
    p_order,
    p_start,
    p_end,
    p_total,
    p_out,
    x_strides,
    delta_strides,
    B_strides,
    C_strides,
    z_strides,
    out_strides,
    length,
    groups,
    dim,
    states,
    chunk,
    chunks,
    first_group,
    launched,
    DELTA_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Walk one chunk: from `p_start`, or from zero; write the output, or only where the chunk ends.

    A is (K, N, D), D and the bias are (K, D), all in the dtype of the state. `p_end` takes the state after
    the chunk, `p_total` the sum of its steps. With ADDS the output is added to what is there.
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = locate(0, dim, chunks, first_group, launched, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    o_nd = o_n[:, None] * dim + o_d[None, :]
    in_nd = (o_n < states)[:, None] & (o_d < dim)[None, :]
    i_chunk = (i_b * groups + i_k) * chunks + i_j

    p_x += i_b * x_strides[0] + i_k * x_strides[2]
    p_delta += i_b * delta_strides[0] + i_k * delta_strides[2]
    p_B += i_b * B_strides[0] + i_k * B_strides[2]
    o_B = o_n * B_strides[3]
    b_A = tl.load(p_A + i_k * states * dim + o_nd, mask=in_nd, other=0.0)
    b_bias = load_channels(None if p_bias is None else p_bias + i_k * dim, o_d, dim, BLOCK_D, STATE)
    if p_out is not None:
        p_C += i_b * C_strides[0] + i_k * C_strides[2]
        o_C = o_n * C_strides[3]
        p_out += i_b * out_strides[0] + i_k * out_strides[2]
        b_skip = load_channels(None if p_D is None else p_D + i_k * dim, o_d, dim, BLOCK_D, STATE)
        if p_z is not None:
            p_z += i_b * z_strides[0] + i_k * z_strides[2]
    if p_start is not None:
        b_h = tl.load(p_start + i_chunk * states * dim + o_nd, mask=in_nd, other=0.0)
    else:
        b_h = tl.zeros((BLOCK_N, BLOCK_D), dtype=STATE)
    b_total = tl.zeros((BLOCK_D,), dtype=STATE)

    i_t = i_j * chunk
    stop = tl.minimum(i_t + chunk, length)
    while i_t < stop:
        # All that the tile reads is asked for before its first store: reads never wait for one another.
        positions, dims, counts = visit(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_xs = load_rows(p_x, x_strides[1], positions, dims, o_d, STATE, TILE)
        b_raws = load_rows(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        if p_out is not None:
            if p_z is not None:
                b_zs = load_rows(p_z, z_strides[1], positions, dims, o_d, STATE, TILE)
            if ADDS:
                b_outs = load_rows(p_out, out_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = step_sizes(b_raws, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
        b_ys = ()
        for s in tl.static_range(TILE):
            b_B = tl.load(p_B + positions[s] * B_strides[1] + o_B, mask=o_n < counts[s], other=0.0).to(STATE)
            b_h = tl.exp(b_dts[s][None, :] * b_A) * b_h + (b_dts[s] * b_xs[s])[None, :] * b_B[:, None]
            if p_out is not None:
                b_C = tl.load(p_C + positions[s] * C_strides[1] + o_C, mask=o_n < counts[s], other=0.0).to(
                    STATE
                )
                b_y = tl.sum(b_h * b_C[:, None], 0) + b_skip * b_xs[s]
                if p_z is not None:
                    b_y = b_y * (b_zs[s] * sigmoid(b_zs[s]))
                if ADDS:
                    b_y += b_outs[s]
                b_ys = b_ys + (b_y,)
            else:
                b_total += b_dts[s]
        if p_out is not None:
            for s in tl.static_range(TILE):
                p_row = p_out + positions[s] * out_strides[1] + o_d
                tl.store(p_row, b_ys[s].to(p_out.dtype.element_ty), mask=o_d < dims[s])
        i_t += TILE

    if p_end is not None:
        tl.store(p_end + i_chunk * states * dim + o_nd, b_h, mask=in_nd)
    if p_total is not None:
        tl.store(p_total + i_chunk * dim + o_d, b_total, mask=o_d < dim)


@triton.jit(do_not_specialize=CHANGING)
def chain_kernel(
    p_states,
    p_totals,
    p_A,
    p_first,
    p_last,
    groups,
    dim,
    states,
    chunks,
    REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Replace what each chunk makes of a zero state by the state that it starts from, chunk after chunk.

    The decay over a whole chunk is exp(A times the sum of its steps); nothing is ever divided by one. A
    program takes one state of BLOCK_D channels. `p_first` is the state before the first chunk, (B, K, N, D),
    or None for zero; `p_last` takes the state after the last one. With REVERSE the chunks are chained from
    the end, for the adjoint.
    """
    blocks = tl.cdiv(dim, BLOCK_D)
    i_task = tl.program_id(0).to(tl.int64)
    i_n = (i_task // blocks) % states
    i_bk = i_task // blocks // states
    o_d = (i_task % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = o_d < dim
    b_A = tl.load(p_A + (i_bk % groups * states + i_n) * dim + o_d, mask=in_d, other=0.0)
    if p_first is not None:
        b_h = tl.load(p_first + (i_bk * states + i_n) * dim + o_d, mask=in_d, other=0.0)
    else:
        b_h = tl.zeros((BLOCK_D,), dtype=p_A.dtype.element_ty)
    p_states += (i_bk * chunks * states + i_n) * dim
    p_totals += i_bk * chunks * dim

    i_j = 0
    while i_j < chunks:
        offsets = ()
        limits = ()
        for s in tl.static_range(TILE):
            i_s = tl.minimum(i_j + s, chunks - 1)
            offsets = offsets + ((chunks - 1 - i_s if REVERSE else i_s).to(tl.int64),)
            limits = limits + (tl.where(i_j + s < chunks, dim, 0),)
        b_sums = load_rows(p_totals, dim, offsets, limits, o_d, p_A.dtype.element_ty, TILE)
        b_ends = load_rows(p_states, states * dim, offsets, limits, o_d, p_A.dtype.element_ty, TILE)
        for s in tl.static_range(TILE):
            tl.store(p_states + offsets[s] * states * dim + o_d, b_h, mask=o_d < limits[s])
            b_h = tl.exp(b_sums[s] * b_A) * b_h + b_ends[s]
        i_j += TILE
    if p_last is not None:
        tl.store(p_last + (i_bk * states + i_n) * dim + o_d, b_h, mask=in_d)
