"""The backward kernels in Triton; names and layouts as in `triton_forward`.

Nothing is kept from the forward. The states are computed again: first where each chunk starts, then, chunk by
chunk, where each tile of TILE steps starts, then tile by tile in registers, from the last tile to the first.
The adjoint of the state walks the other way; `flow` is what it brings to a step from the steps after it.
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
def adjoint_kernel(
    p_delta,
    p_A,
    p_C,
    p_bias,
    p_z,
    p_order,
    p_grad_out,
    p_sent,
    delta_strides,
    C_strides,
    z_strides,
    grad_out_strides,
    length,
    groups,
    dim,
    states,
    chunk,
    chunks,
    DELTA_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Walk one chunk backwards from a flow of zero; `p_sent` takes what leaves its start."""
    STATE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = locate(0, dim, chunks, 0, groups, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    o_nd = o_n[:, None] * dim + o_d[None, :]
    in_nd = (o_n < states)[:, None] & (o_d < dim)[None, :]

    p_delta += i_b * delta_strides[0] + i_k * delta_strides[2]
    p_C += i_b * C_strides[0] + i_k * C_strides[2]
    o_C = o_n * C_strides[3]
    p_grad_out += i_b * grad_out_strides[0] + i_k * grad_out_strides[2]
    if p_z is not None:
        p_z += i_b * z_strides[0] + i_k * z_strides[2]
    b_A = tl.load(p_A + i_k * states * dim + o_nd, mask=in_nd, other=0.0)
    b_bias = load_channels(None if p_bias is None else p_bias + i_k * dim, o_d, dim, BLOCK_D, STATE)
    b_flow = tl.zeros((BLOCK_N, BLOCK_D), dtype=STATE)

    stop = tl.minimum((i_j + 1) * chunk, length)
    # A chunk is made of whole tiles, but for what lies beyond the end of the sequence.
    i_t = i_j * chunk + (stop - 1 - i_j * chunk) // TILE * TILE
    while i_t >= i_j * chunk:
        positions, dims, counts = visit(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_raws = load_rows(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        b_grads = load_rows(p_grad_out, grad_out_strides[1], positions, dims, o_d, STATE, TILE)
        if p_z is not None:
            b_zs = load_rows(p_z, z_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = step_sizes(b_raws, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
        for s in tl.static_range(TILE - 1, -1, -1):
            b_grad = b_grads[s]
            if p_z is not None:
                b_grad = b_grad * (b_zs[s] * sigmoid(b_zs[s]))
            b_C = tl.load(p_C + positions[s] * C_strides[1] + o_C, mask=o_n < counts[s], other=0.0).to(STATE)
            b_flow += b_grad[None, :] * b_C[:, None]
            b_flow *= tl.exp(b_dts[s][None, :] * b_A)
        i_t -= TILE

    i_chunk = (i_b * groups + i_k) * chunks + i_j
    tl.store(p_sent + i_chunk * states * dim + o_nd, b_flow, mask=in_nd)


@triton.jit(do_not_specialize=CHANGING)
def gradient_kernel(
    p_x,
    p_delta,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_z,
    p_order,
    p_grad_out,
    p_start,
    p_flow,
    p_tiles,
    p_grad_x,
    p_grad_delta,
    p_grad_z,
    p_grad_B,
    p_grad_C,
    p_grad_parameters,
    x_strides,
    delta_strides,
    B_strides,
    C_strides,
    z_strides,
    grad_out_strides,
    grad_x_strides,
    length,
    batch,
    groups,
    dim,
    states,
    chunk,
    chunks,
    first,
    first_group,
    launched,
    DELTA_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write all gradients of one chunk, from the state at its start and the flow into its end.

    `p_start` is (B, K, J, N, D), None for zeros; `p_flow` likewise, never None. `p_tiles` is scratch for the
    states at the starts of the tiles, (programs of the launch, tiles of a chunk, N, BLOCK_D). The gradients
    of delta and z are contiguous, (B, L, K, D). Sums beyond a program are left to the caller: the gradients
    of B and C are (blocks of channels, B, L, K, N), those of A, D and the bias (B, J, K, N + 2, D).
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = locate(first, dim, chunks, first_group, launched, BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    in_n, in_d = o_n < states, o_d < dim
    o_nd = o_n[:, None] * dim + o_d[None, :]
    in_nd = in_n[:, None] & in_d[None, :]
    i_chunk = (i_b * groups + i_k) * chunks + i_j

    p_x += i_b * x_strides[0] + i_k * x_strides[2]
    p_delta += i_b * delta_strides[0] + i_k * delta_strides[2]
    p_B += i_b * B_strides[0] + i_k * B_strides[2]
    o_B = o_n * B_strides[3]
    p_C += i_b * C_strides[0] + i_k * C_strides[2]
    o_C = o_n * C_strides[3]
    p_grad_out += i_b * grad_out_strides[0] + i_k * grad_out_strides[2]
    p_grad_x += i_b * grad_x_strides[0] + i_k * grad_x_strides[2]
    # Where this image and group stand in what is contiguous, (B, L, K, ...), counted in rows.
    i_row = i_b * length * groups + i_k
    p_grad_delta += i_row * dim
    if p_z is not None:
        p_z += i_b * z_strides[0] + i_k * z_strides[2]
        p_grad_z += i_row * dim
    i_projection = (i_d * batch * length * groups + i_row) * states
    p_grad_B += i_projection
    p_grad_C += i_projection
    o_tile = o_n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    p_tiles += tl.program_id(0).to(tl.int64) * (chunk // TILE) * states * BLOCK_D

    b_A = tl.load(p_A + i_k * states * dim + o_nd, mask=in_nd, other=0.0)
    b_bias = load_channels(None if p_bias is None else p_bias + i_k * dim, o_d, dim, BLOCK_D, STATE)
    b_skip = load_channels(None if p_D is None else p_D + i_k * dim, o_d, dim, BLOCK_D, STATE)
    b_flow = tl.load(p_flow + i_chunk * states * dim + o_nd, mask=in_nd, other=0.0)
    if p_start is not None:
        b_h = tl.load(p_start + i_chunk * states * dim + o_nd, mask=in_nd, other=0.0)
    else:
        b_h = tl.zeros((BLOCK_N, BLOCK_D), dtype=STATE)
    b_grad_A = tl.zeros((BLOCK_N, BLOCK_D), dtype=STATE)
    b_grad_D = tl.zeros((BLOCK_D,), dtype=STATE)
    b_grad_bias = tl.zeros((BLOCK_D,), dtype=STATE)

    start = i_j * chunk
    stop = tl.minimum(start + chunk, length)
    i_t = start
    while i_t + TILE < stop:
        p_tile = p_tiles + (i_t - start) // TILE * states * BLOCK_D
        tl.store(p_tile + o_tile, b_h, mask=in_n[:, None])
        positions, dims, counts = visit(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_xs = load_rows(p_x, x_strides[1], positions, dims, o_d, STATE, TILE)
        b_raws = load_rows(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = step_sizes(b_raws, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
        for s in tl.static_range(TILE):
            b_B = tl.load(p_B + positions[s] * B_strides[1] + o_B, mask=o_n < counts[s], other=0.0).to(STATE)
            b_h = tl.exp(b_dts[s][None, :] * b_A) * b_h + (b_dts[s] * b_xs[s])[None, :] * b_B[:, None]
        i_t += TILE
    # A thread may read what another one of the program has written.
    tl.debug_barrier()

    while i_t >= start:
        positions, dims, counts = visit(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_xs = load_rows(p_x, x_strides[1], positions, dims, o_d, STATE, TILE)
        b_raws = load_rows(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        b_grads = load_rows(p_grad_out, grad_out_strides[1], positions, dims, o_d, STATE, TILE)
        if p_z is not None:
            b_zs = load_rows(p_z, z_strides[1], positions, dims, o_d, STATE, TILE)
        if ADDS:
            b_grad_xs = load_rows(p_grad_x, grad_x_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = step_sizes(b_raws, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
        b_states = (b_h,)
        for s in tl.static_range(TILE):
            b_B = tl.load(p_B + positions[s] * B_strides[1] + o_B, mask=o_n < counts[s], other=0.0).to(STATE)
            b_h = tl.exp(b_dts[s][None, :] * b_A) * b_h + (b_dts[s] * b_xs[s])[None, :] * b_B[:, None]
            b_states = b_states + (b_h,)

        for s in tl.static_range(TILE - 1, -1, -1):
            in_row = o_d < dims[s]
            b_B = tl.load(p_B + positions[s] * B_strides[1] + o_B, mask=o_n < counts[s], other=0.0).to(STATE)
            b_C = tl.load(p_C + positions[s] * C_strides[1] + o_C, mask=o_n < counts[s], other=0.0).to(STATE)
            b_grad = b_grads[s]
            if p_z is not None:
                b_open = sigmoid(b_zs[s])
                b_y = tl.sum(b_states[s + 1] * b_C[:, None], 0) + b_skip * b_xs[s]
                b_by_gate = b_grad * b_y * b_open * (1.0 + b_zs[s] * (1.0 - b_open))
                p_row = p_grad_z + positions[s] * groups * dim + o_d
                tl.store(p_row, b_by_gate.to(p_grad_z.dtype.element_ty), mask=in_row)
                b_grad = b_grad * (b_zs[s] * b_open)
            b_adjoint = b_flow + b_grad[None, :] * b_C[:, None]
            b_flow = b_adjoint * tl.exp(b_dts[s][None, :] * b_A)
            b_through = b_flow * b_states[s]
            b_by_input = tl.sum(b_adjoint * b_B[:, None], 0)
            b_by_step = b_by_input * b_xs[s] + tl.sum(b_through * b_A, 0)
            if DELTA_SOFTPLUS:
                b_raw = b_raws[s] + b_bias
                b_by_step = tl.where(b_raw > 20.0, b_by_step, b_by_step * sigmoid(b_raw))
            b_by_step = tl.where(in_row, b_by_step, 0.0)
            b_grad_A += b_through * b_dts[s][None, :]
            b_grad_D += b_grad * b_xs[s]
            b_grad_bias += b_by_step

            o_row = positions[s] * groups
            in_projection = o_n < counts[s]
            b_grad_B = tl.sum(b_adjoint * (b_dts[s] * b_xs[s])[None, :], 1)
            tl.store(p_grad_B + o_row * states + o_n, b_grad_B, mask=in_projection)
            b_grad_C = tl.sum(b_grad[None, :] * b_states[s + 1], 1)
            tl.store(p_grad_C + o_row * states + o_n, b_grad_C, mask=in_projection)
            b_grad_x = b_by_input * b_dts[s] + b_skip * b_grad
            if ADDS:
                b_grad_x += b_grad_xs[s]
            p_row = p_grad_x + positions[s] * grad_x_strides[1] + o_d
            tl.store(p_row, b_grad_x.to(p_grad_x.dtype.element_ty), mask=in_row)
            p_row = p_grad_delta + o_row * dim + o_d
            tl.store(p_row, b_by_step.to(p_grad_delta.dtype.element_ty), mask=in_row)
        i_t -= TILE
        p_tile = p_tiles + (i_t - start) // TILE * states * BLOCK_D
        b_h = tl.load(p_tile + o_tile, mask=o_n[:, None] < tl.where(i_t >= start, states, 0), other=0.0)

    p_grad_parameters += ((i_b * chunks + i_j) * groups + i_k) * (states + 2) * dim
    tl.store(p_grad_parameters + o_nd, b_grad_A, mask=in_nd)
    tl.store(p_grad_parameters + states * dim + o_d, b_grad_D, mask=in_d)
    tl.store(p_grad_parameters + (states + 1) * dim + o_d, b_grad_bias, mask=in_d)
