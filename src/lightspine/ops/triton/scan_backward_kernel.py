"""Backward kernel of the selective scan over groups of channels.

Shapes: x, dt and z (B, L, K, D), channels adjacent; A (K, N, D); B and C (B, L, K, N); D and bias (K, D).
A program takes one chunk of a sequence and BLOCK_D channels with all their states. Its warps own different
channels; a thread holds up to 4 states of 4 neighboring channels (`state_layout`), so that a sum over the
states or over the channels of a warp takes two or three shuffles per number.

Names: `p_*` pointer, `o_*` offsets, `i_*` index; image b, group k, chunk j, block of channels d, position t.
Everything is counted in base 2: s = dt / ln 2, so that decay = 2^(s A).
"""

# Kernels are written in Triton's language: untyped, and not executed by Python.
# mypy: ignore-errors
# ruff: noqa: C901

import triton.language as tl

from lightspine.ops.triton.device_functions import LN2, LOG2E, softplus2
from lightspine.ops.triton.tile_language import (
    as_tile,
    device_function,
    exp2,
    gl,
    jit,
    load_partials,
    partial_layout,
    prevent_hoisting,
    reciprocal,
    row_layout,
    shared_partials,
    shared_rows,
    shared_tile,
    state_layout,
    step_layout,
    warp_sums,
)

# Integers that vary between calls, for which Triton must not specialize the kernel.
VARYING = (
    "length",
    "batch",
    "groups",
    "chunk",
    "chunks",
    "reversed_groups",
    "first_group",
    "launched_groups",
)
# Steps whose states are in registers at a time.
TILE = tl.constexpr(4)


@device_function
def _locate_rows(p_order, o_t, i_k, length, reversed_groups):
    """Return the positions in memory, in rows, that the steps `o_t` of a scan visit."""
    if p_order is not None:
        return gl.load(p_order + i_k * length + o_t).to(gl.int64)
    else:
        is_reversed = ((reversed_groups >> i_k.to(gl.int32)) & 1) != 0
        return gl.where(is_reversed, length - 1 - o_t, o_t).to(gl.int64)


@device_function
def _load_parameter(p, o_d, mask, STATE: tl.constexpr, BLOCK_D: tl.constexpr, LAYOUT: tl.constexpr):
    """Load an optional parameter of each channel, zeros if it is not given."""
    if p is not None:
        return gl.load(p + o_d, mask=mask, other=0.0)
    else:
        return gl.zeros([BLOCK_D], STATE, layout=LAYOUT)


@device_function
def _load_steps(p, o_row, stride, o_d, mask, STATE: tl.constexpr):
    """Load (steps, channels) and widen them; zeros where `mask` is false."""
    return gl.load(p + (o_row * stride)[:, None] + o_d[None, :], mask=mask, other=0.0).to(STATE)


@device_function
def _base2_steps(
    p_dt,
    o_row,
    stride,
    o_d,
    bias,
    mask,
    STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """Return dt before softplus and s, both in base 2.

    Where `mask` is false, s is zero, which keeps the state.
    """
    v = (_load_steps(p_dt, o_row, stride, o_d, mask, STATE) + bias[None, :]) * LOG2E
    s = softplus2(v, ACCURATE) if SOFTPLUS else v
    return v, gl.where(mask, s, 0.0)


@device_function
def _advance(h, A, steps, inputs, rows_B, i_t, STATES: tl.constexpr):
    """Return the state after step `i_t` of a stretch."""
    s = steps.index(i_t).load(gl.SliceLayout(0, STATES))
    dtx = inputs.index(i_t).load(gl.SliceLayout(0, STATES))
    B = rows_B.index(i_t).load(gl.SliceLayout(1, STATES))
    return exp2(s[None, :] * A) * h + dtx[None, :] * B[:, None]


@jit(do_not_specialize=VARYING)
def chunk_scan_bwd_kernel(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_z,
    p_order,
    p_grad_out,
    p_start,
    p_adjoint,
    p_grad_x,
    p_grad_dt,
    p_grad_z,
    p_grad_B,
    p_grad_C,
    p_grad_D,
    p_grad_bias,
    x_strides,
    dt_strides,
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
    reversed_groups,
    first_group,
    launched_groups,
    SOFTPLUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRETCH: tl.constexpr,
    STRETCHES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Compute all gradients of chunks of at most STRETCHES stretches of STRETCH steps, last stretch first.

    `p_start` (B, K, J, N, D) is the state that enters each chunk, or None for zero, and `p_adjoint`, of the
    same shape, the adjoint that enters its end; the gradient of A takes the place of the latter. From the
    start the states are recomputed: first those before each stretch and then those before every TILE-th step
    of one stretch, in shared memory, at last those of TILE steps, in registers.

    The gradients of dt and z are contiguous, (B, L, K, D). Sums beyond a program are left to the caller: the
    gradients of B and C are (blocks of channels, B, L, K, N), those of D and the bias (B, K, J, D).
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    ACCURATE: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth >= 32
    STATES: tl.constexpr = state_layout(BLOCK_N, BLOCK_D, WARPS)
    STEPS: tl.constexpr = step_layout(BLOCK_D, WARPS)
    BY_STATE: tl.constexpr = row_layout(BLOCK_N, WARPS)
    PARTIAL: tl.constexpr = partial_layout(BLOCK_N, WARPS)

    blocks = gl.cdiv(dim, BLOCK_D)
    i_task = gl.program_id(0)
    i_d = i_task % blocks
    i_j = i_task // blocks % chunks
    i_bk = i_task // blocks // chunks
    i_b = (i_bk // launched_groups).to(gl.int64)
    i_k = (first_group + i_bk % launched_groups).to(gl.int64)
    i_chunk = (i_b * groups + i_k) * chunks + i_j

    o_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, STATES))
    o_state_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, STATES))
    o_nd = o_n[:, None] * dim + o_state_d[None, :]
    in_nd = (o_n < states)[:, None] & (o_state_d < dim)[None, :]
    o_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, STEPS))
    in_d = o_d < dim
    o_t = gl.arange(0, STRETCH, layout=gl.SliceLayout(1, STEPS))
    o_by_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, BY_STATE))
    o_by_t = gl.arange(0, STRETCH, layout=gl.SliceLayout(1, BY_STATE))
    o_sum_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTIAL)))
    o_sum_t = gl.arange(0, TILE, layout=gl.SliceLayout(1, gl.SliceLayout(1, PARTIAL)))

    p_x += i_b * x_strides[0] + i_k * x_strides[2]
    p_dt += i_b * dt_strides[0] + i_k * dt_strides[2]
    p_B += i_b * B_strides[0] + i_k * B_strides[2]
    p_C += i_b * C_strides[0] + i_k * C_strides[2]
    p_grad_out += i_b * grad_out_strides[0] + i_k * grad_out_strides[2]
    p_grad_x += i_b * grad_x_strides[0] + i_k * grad_x_strides[2]
    # The first row of this image and group in the contiguous tensors (B, L, K, ...).
    i_first = i_b * length * groups + i_k
    p_grad_dt += i_first * dim
    if p_z is not None:
        p_z += i_b * z_strides[0] + i_k * z_strides[2]
        p_grad_z += i_first * dim
    o_image = (i_d * batch * length * groups + i_first) * states
    p_grad_B += o_image
    p_grad_C += o_image

    A = gl.load(p_A + i_k * states * dim + o_nd, mask=in_nd, other=0.0)
    bias = _load_parameter(
        None if p_bias is None else p_bias + i_k * dim, o_d, in_d, STATE, BLOCK_D, gl.SliceLayout(0, STEPS)
    )
    skip = _load_parameter(
        None if p_D is None else p_D + i_k * dim, o_d, in_d, STATE, BLOCK_D, gl.SliceLayout(0, STEPS)
    )
    p_adjoint += i_chunk * states * dim
    adjoint = gl.load(p_adjoint + o_nd, mask=in_nd, other=0.0)
    grad_A = gl.zeros([BLOCK_N, BLOCK_D], STATE, layout=STATES)
    grad_D = gl.zeros([BLOCK_D], STATE, layout=gl.SliceLayout(0, STEPS))
    grad_bias = gl.zeros([BLOCK_D], STATE, layout=gl.SliceLayout(0, STEPS))

    # States before the stretches but the first and the last, and before the tiles of a stretch but the last.
    stretch_states = shared_tile(STATE, BLOCK_N, BLOCK_D, STRETCHES - 2)
    tile_states = shared_tile(STATE, BLOCK_N, BLOCK_D, STRETCH // TILE - 1)
    # What the recurrence reads of each step, and afterwards what it leaves in the same place.
    steps = shared_rows(STATE, STRETCH, BLOCK_D)
    inputs = shared_rows(STATE, STRETCH, BLOCK_D)
    outputs = shared_rows(STATE, STRETCH, BLOCK_D)
    rows_B = shared_rows(STATE, STRETCH, BLOCK_N)
    rows_C = shared_rows(STATE, STRETCH, BLOCK_N)
    partial_B = shared_partials(STATE, TILE, BLOCK_N, WARPS)
    partial_C = shared_partials(STATE, TILE, BLOCK_N, WARPS)

    if p_start is not None:
        p_start += i_chunk * states * dim + o_nd
        h = gl.load(p_start, mask=in_nd, other=0.0)
    else:
        h = gl.zeros([BLOCK_N, BLOCK_D], STATE, layout=STATES)
    start = i_j * chunk
    stop = gl.minimum(start + chunk, length)
    last = gl.cdiv(stop - start, STRETCH) - 1

    for i_s in range(0, last):
        o_row = _locate_rows(p_order, start + i_s * STRETCH + o_t, i_k, length, reversed_groups)
        mask = in_d[None, :]
        _, s = _base2_steps(p_dt, o_row, dt_strides[1], o_d, bias, mask, STATE, SOFTPLUS, ACCURATE)
        x = _load_steps(p_x, o_row, x_strides[1], o_d, mask, STATE)
        as_tile(steps).store(s)
        as_tile(inputs).store(s * LN2 * x)
        o_row = _locate_rows(p_order, start + i_s * STRETCH + o_by_t, i_k, length, reversed_groups)
        mask = (o_by_n < states)[None, :]
        as_tile(rows_B).store(_load_steps(p_B, o_row, B_strides[1], o_by_n * B_strides[3], mask, STATE))
        for i_tile in range(0, STRETCH // TILE):
            for i in tl.static_range(TILE):
                h = _advance(h, A, steps, inputs, rows_B, i_tile * TILE + i, STATES)
        if i_s < last - 1:
            stretch_states.index(i_s).store(h)

    for i_s in range(0, last + 1):
        i_stretch = last - i_s
        begin = start + i_stretch * STRETCH
        end = gl.minimum(begin + STRETCH, stop)
        tiles = gl.cdiv(end - begin, TILE)
        in_td = (begin + o_t < end)[:, None] & in_d[None, :]
        o_row = _locate_rows(p_order, gl.minimum(begin + o_t, end - 1), i_k, length, reversed_groups)
        v, s = _base2_steps(p_dt, o_row, dt_strides[1], o_d, bias, in_td, STATE, SOFTPLUS, ACCURATE)
        x = _load_steps(p_x, o_row, x_strides[1], o_d, in_td, STATE)
        grad = _load_steps(p_grad_out, o_row, grad_out_strides[1], o_d, in_td, STATE)
        if p_z is not None:
            z = _load_steps(p_z, o_row, z_strides[1], o_d, in_td, STATE)
            grad *= z * reciprocal(1.0 + exp2(z * -LOG2E))
        as_tile(steps).store(s)
        as_tile(inputs).store(s * LN2 * x)
        as_tile(outputs).store(grad)
        mask = (begin + o_by_t < end)[:, None] & (o_by_n < states)[None, :]
        o_by_row = _locate_rows(p_order, gl.minimum(begin + o_by_t, end - 1), i_k, length, reversed_groups)
        as_tile(rows_B).store(_load_steps(p_B, o_by_row, B_strides[1], o_by_n * B_strides[3], mask, STATE))
        as_tile(rows_C).store(_load_steps(p_C, o_by_row, C_strides[1], o_by_n * C_strides[3], mask, STATE))

        for i_tile in range(0, tiles - 1):
            tile_states.index(i_tile).store(h)
            for i in tl.static_range(TILE):
                h = _advance(h, A, steps, inputs, rows_B, i_tile * TILE + i, STATES)

        for i_back in range(0, tiles):
            i_tile = tiles - 1 - i_back
            befores = (h,)
            for i in tl.static_range(TILE - 1):
                h = _advance(h, A, steps, inputs, rows_B, i_tile * TILE + i, STATES)
                befores = befores + (h,)  # noqa: RUF005 - no starred tuples in Triton's language
            for i in tl.static_range(TILE - 1, -1, -1):
                i_t = i_tile * TILE + i
                b_s = steps.index(i_t).load(gl.SliceLayout(0, STATES))
                b_dtx = inputs.index(i_t).load(gl.SliceLayout(0, STATES))
                b_grad = outputs.index(i_t).load(gl.SliceLayout(0, STATES))
                b_B = rows_B.index(i_t).load(gl.SliceLayout(1, STATES))
                b_C = rows_C.index(i_t).load(gl.SliceLayout(1, STATES))
                decay = exp2(b_s[None, :] * A)
                kept = decay * befores[i]
                after = befores[i + 1] if i < TILE - 1 else kept + b_dtx[None, :] * b_B[:, None]
                partial_C.index(i).store(warp_sums(b_grad[None, :] * after, WARPS))
                adjoint += b_grad[None, :] * b_C[:, None]
                partial_B.index(i).store(warp_sums(adjoint * b_dtx[None, :], WARPS))
                by_decay = adjoint * kept
                grad_A += by_decay * b_s[None, :]
                inputs.index(i_t).store(gl.sum(adjoint * b_B[:, None], 0))
                steps.index(i_t).store(gl.sum(by_decay * A, 0))
                if p_z is not None:
                    outputs.index(i_t).store(gl.sum(after * b_C[:, None], 0))
                adjoint *= decay
            o_sum = begin + i_tile * TILE + o_sum_t
            o_row_sum = _locate_rows(p_order, gl.minimum(o_sum, end - 1), i_k, length, reversed_groups)
            o_sum_tn = (o_row_sum * groups * states)[:, None] + o_sum_n[None, :]
            in_sum = (o_sum < end)[:, None] & (o_sum_n < states)[None, :]
            gl.store(p_grad_B + o_sum_tn, gl.sum(load_partials(partial_B, PARTIAL), 1), mask=in_sum)
            gl.store(p_grad_C + o_sum_tn, gl.sum(load_partials(partial_C, PARTIAL), 1), mask=in_sum)
            # The state before the tile that comes next; of the first one it is not used.
            h = tile_states.index(gl.maximum(i_tile - 1, 0)).load(STATES)

        # What the recurrence would cost in registers is loaded and computed again.
        begin = prevent_hoisting(begin)
        in_td = (begin + o_t < end)[:, None] & in_d[None, :]
        o_row = _locate_rows(p_order, gl.minimum(begin + o_t, end - 1), i_k, length, reversed_groups)
        v, s = _base2_steps(p_dt, o_row, dt_strides[1], o_d, bias, in_td, STATE, SOFTPLUS, ACCURATE)
        x = _load_steps(p_x, o_row, x_strides[1], o_d, in_td, STATE)
        grad = _load_steps(p_grad_out, o_row, grad_out_strides[1], o_d, in_td, STATE)
        by_dtx = as_tile(inputs).load(STEPS)
        by_dt = by_dtx * x + as_tile(steps).load(STEPS)
        if p_z is not None:
            z = _load_steps(p_z, o_row, z_strides[1], o_d, in_td, STATE)
            gate = reciprocal(1.0 + exp2(z * -LOG2E))
            y = as_tile(outputs).load(STEPS) + skip[None, :] * x
            by_z = grad * y * gate * (1.0 + z * (1.0 - gate))
            p_by = p_grad_z + (o_row * groups * dim)[:, None] + o_d[None, :]
            gl.store(p_by, by_z.to(p_grad_z.dtype.element_ty), mask=in_td)
            grad *= z * gate
        if SOFTPLUS:
            by_dt *= exp2(v - s)
        by_dt = gl.where(in_td, by_dt, 0.0)
        grad_bias += gl.sum(by_dt, 0)
        grad_D += gl.sum(grad * x, 0)
        p_by = p_grad_dt + (o_row * groups * dim)[:, None] + o_d[None, :]
        gl.store(p_by, by_dt.to(p_grad_dt.dtype.element_ty), mask=in_td)
        by_x = by_dtx * (s * LN2) + skip[None, :] * grad
        p_by = p_grad_x + (o_row * grad_x_strides[1])[:, None] + o_d[None, :]
        if ACCUMULATE:
            by_x += gl.load(p_by, mask=in_td, other=0.0).to(STATE)
        gl.store(p_by, by_x.to(p_grad_x.dtype.element_ty), mask=in_td)

        if i_stretch > 1:
            h = stretch_states.index(i_stretch - 2).load(STATES)
        else:
            if p_start is not None:
                h = gl.load(p_start, mask=in_nd, other=0.0)
            else:
                h = gl.zeros([BLOCK_N, BLOCK_D], STATE, layout=STATES)

    # As invariants of the loops these offsets would need registers.
    i_d = prevent_hoisting(i_d)
    o_state_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, STATES))
    in_nd = (o_n < states)[:, None] & (o_state_d < dim)[None, :]
    gl.store(p_adjoint + o_n[:, None] * dim + o_state_d[None, :], grad_A * LN2, mask=in_nd)
    o_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, STEPS))
    in_d = o_d < dim
    gl.store(p_grad_D + i_chunk * dim + o_d, grad_D, mask=in_d)
    gl.store(p_grad_bias + i_chunk * dim + o_d, grad_bias, mask=in_d)
