"""Triton kernels of the selective scan over groups of channels, forward and backward.

Shapes: x, dt and z (B, L, K, D), channels adjacent; A (K, N, D); B and C (B, L, K, N); D and bias (K, D).
One program is one warp. It holds BLOCK_D channels with all their states as a (BLOCK_N, BLOCK_D) block in
registers and scans the positions of one chunk. Names: `i_*` index, `o_*` offsets, `p_*` pointer, b image,
k group, j chunk, d channels, n states, t position in the chunk. An optional tensor that is not given is None.

Per chunk the kernels keep (B, K, J, N, D) states and (B, K, J, D) sums of dt, contiguous, in the dtype of A.
"""

# Triton's language is untyped and has no starred tuples; its branches are decided by the compiler.
# mypy: ignore-errors
# ruff: noqa: C901, RUF005

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Integers that vary between calls, for which Triton must not specialize the kernel.
VARYING = (
    "length",
    "batch",
    "groups",
    "chunk",
    "chunks",
    "save_every",
    "saves",
    "reversed_groups",
    "first_group",
    "launched_groups",
)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x, FAST_MATH: tl.constexpr):
    """Return log(1 + e^x); x itself above 20, as PyTorch does.

    Below -2 a series in e^x replaces the logarithm, which would lose the digits of a small sum: 1 + e^x.
    """
    e = tl.exp2(x * LOG2_E)
    if FAST_MATH:
        # Seven terms leave a relative error of 6e-8 at e = 1/8.
        series = 0.2 - e * (0.16666666666666667 - e * 0.14285714285714285)
        series = e * (1.0 - e * (0.5 - e * (0.3333333333333333 - e * (0.25 - e * series))))
        # tl.log2 is a software polynomial; this is the special-function unit.
        small_or_not = tl.where(e < 0.125, series, libdevice.fast_log2f(1.0 + e) * LN_2)
    else:
        # log(1 + e) times what 1 + e lost of e.
        one_plus = 1.0 + e
        kept = one_plus - 1.0
        small_or_not = tl.where(kept > 0.0, tl.log(one_plus) * (e / tl.where(kept > 0.0, kept, 1.0)), e)
    return tl.where(x > 20.0, x, small_or_not)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def locate_program(dim, chunks, first_group, launched_groups, i_program, BLOCK_D: tl.constexpr):
    """Return image, group, chunk and block of channels of a program; blocks of channels vary fastest."""
    i_task = i_program.to(tl.int64)
    blocks = tl.cdiv(dim, BLOCK_D)
    i_rest = i_task // blocks
    i_bk = i_rest // chunks
    i_k = first_group + i_bk % launched_groups
    return i_bk // launched_groups, i_k, (i_rest % chunks).to(tl.int32), i_task % blocks


@triton.jit
def is_reversed(i_k, reversed_groups):
    """Return whether a group scans from the last position to the first: bit k of `reversed_groups`."""
    return ((reversed_groups >> i_k.to(tl.int32)) & 1) != 0


@triton.jit
def locate_row(p_order, i_t, i_k, length, reversed_groups):
    """Return the position in memory, in rows, that step `i_t` of a scan visits."""
    if p_order is not None:
        return tl.load(p_order + i_k * length + i_t)
    else:
        return tl.where(is_reversed(i_k, reversed_groups), length - 1 - i_t, i_t)


@triton.jit
def row_pointer(p_rows, i_row, stride):
    """Return the address of a row: 32-bit row times 32-bit stride in 64 bits, one instruction."""
    return p_rows + i_row.to(tl.int64) * stride


@triton.jit
def load_row(p_row, offsets, mask, DTYPE: tl.constexpr):
    """Load the channels, or the states, of one row and widen them."""
    return tl.load(p_row + offsets, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_parameter(p_row, o_d, mask, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """Load an optional parameter of each channel, zeros if it is not given."""
    if p_row is not None:
        return tl.load(p_row + o_d, mask=mask, other=0.0)
    else:
        return tl.zeros((BLOCK_D,), dtype=DTYPE)


@triton.jit(do_not_specialize=VARYING)
def chunk_scan_fwd_kernel(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_D,
    p_bias,
    p_z,
    p_order,
    p_start,
    p_end,
    p_dt_sum,
    p_saved,
    p_out,
    x_strides,
    dt_strides,
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
    save_every,
    saves,
    reversed_groups,
    first_group,
    launched_groups,
    SOFTPLUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FAST_MATH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scan one chunk from the state `p_start`, or from zero.

    Writes whichever is given: the output `p_out`, the state after the chunk `p_end`, the sum of dt over the
    chunk `p_dt_sum`, and the state before every `save_every`-th step `p_saved` (B, K, saves, N, D). With
    ACCUMULATE the output is added to what `p_out` holds.
    """
    DTYPE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = locate_program(dim, chunks, first_group, launched_groups, tl.program_id(0), BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    in_d = o_d < dim
    in_n = o_n < states
    o_nd = o_n[:, None] * dim + o_d[None, :]
    in_nd = in_n[:, None] & in_d[None, :]
    i_bk = i_b * groups + i_k
    i_chunk = i_bk * chunks + i_j

    p_x += i_b * x_strides[0] + i_k * x_strides[2]
    p_dt += i_b * dt_strides[0] + i_k * dt_strides[2]
    p_B += i_b * B_strides[0] + i_k * B_strides[2]
    o_B = o_n * B_strides[3]
    A = tl.load(p_A + i_k * states * dim + o_nd, mask=in_nd, other=0.0) * LOG2_E
    bias = load_parameter(None if p_bias is None else p_bias + i_k * dim, o_d, in_d, BLOCK_D, DTYPE)
    if p_out is not None:
        p_C += i_b * C_strides[0] + i_k * C_strides[2]
        o_C = o_n * C_strides[3]
        p_out += i_b * out_strides[0] + i_k * out_strides[2]
        skip = load_parameter(None if p_D is None else p_D + i_k * dim, o_d, in_d, BLOCK_D, DTYPE)
        if p_z is not None:
            p_z += i_b * z_strides[0] + i_k * z_strides[2]
    if p_start is not None:
        h = tl.load(p_start + i_chunk * states * dim + o_nd, mask=in_nd, other=0.0)
    else:
        h = tl.zeros((BLOCK_N, BLOCK_D), dtype=DTYPE)
    dt_sum = tl.zeros((BLOCK_D,), dtype=DTYPE)

    i_t = i_j * chunk
    stop = tl.minimum(i_t + chunk, length)
    i_row = locate_row(p_order, i_t, i_k, length, reversed_groups)
    # Without an order, one step moves every pointer by one row. One step per iteration: more of them in
    # straight code compile longer and save few instructions.
    direction = tl.where(is_reversed(i_k, reversed_groups), -1, 1)
    p_x = row_pointer(p_x, i_row, x_strides[1])
    p_dt = row_pointer(p_dt, i_row, dt_strides[1])
    p_B = row_pointer(p_B, i_row, B_strides[1])
    if p_out is not None:
        p_C = row_pointer(p_C, i_row, C_strides[1])
        p_out = row_pointer(p_out, i_row, out_strides[1])
        if p_z is not None:
            p_z = row_pointer(p_z, i_row, z_strides[1])
    while i_t < stop:
        # Without saved states the chunk is one stretch of steps.
        end = stop
        if p_saved is not None:
            i_save = i_bk * saves + i_t // save_every
            tl.store(p_saved + i_save * states * dim + o_nd, h, mask=in_nd)
            end = tl.minimum(i_t + save_every, stop)
        while i_t < end:
            x = load_row(p_x, o_d, in_d, DTYPE)
            dt = load_row(p_dt, o_d, in_d, DTYPE) + bias
            B = load_row(p_B, o_B, in_n, DTYPE)
            if p_out is not None:
                C = load_row(p_C, o_C, in_n, DTYPE)
                if p_z is not None:
                    z = load_row(p_z, o_d, in_d, DTYPE)
                if ACCUMULATE:
                    before = load_row(p_out, o_d, in_d, DTYPE)
            if SOFTPLUS:
                dt = softplus(dt, FAST_MATH)
            h = tl.exp2(dt[None, :] * A) * h + (dt * x)[None, :] * B[:, None]
            if p_dt_sum is not None:
                dt_sum += dt
            if p_out is not None:
                y = tl.sum(h * C[:, None], 0) + skip * x
                if p_z is not None:
                    y *= z * sigmoid(z)
                if ACCUMULATE:
                    y += before
                tl.store(p_out + o_d, y.to(p_out.dtype.element_ty), mask=in_d)
            i_t += 1
            rows = direction
            if p_order is not None:
                i_next = locate_row(p_order, tl.minimum(i_t, length - 1), i_k, length, reversed_groups)
                rows = i_next - i_row
                i_row = i_next
            p_x = row_pointer(p_x, rows, x_strides[1])
            p_dt = row_pointer(p_dt, rows, dt_strides[1])
            p_B = row_pointer(p_B, rows, B_strides[1])
            if p_out is not None:
                p_C = row_pointer(p_C, rows, C_strides[1])
                p_out = row_pointer(p_out, rows, out_strides[1])
                if p_z is not None:
                    p_z = row_pointer(p_z, rows, z_strides[1])

    if p_end is not None:
        tl.store(p_end + i_chunk * states * dim + o_nd, h, mask=in_nd)
    if p_dt_sum is not None:
        tl.store(p_dt_sum + i_chunk * dim + o_d, dt_sum, mask=in_d)


@triton.jit(do_not_specialize=VARYING)
def state_passing_kernel(
    p_states,
    p_dt_sums,
    p_A,
    p_initial,
    p_final,
    groups,
    dim,
    states,
    chunks,
    REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """State passing: replace the state that each chunk adds, in place, by the state that enters it.

    A chunk decays the state that enters it by exp(A times its sum of dt). One program takes one state of
    BLOCK_D channels and loops over the chunks; the loads of BLOCK_J chunks are issued together.
    `p_initial` is the state before the first chunk, (B, K, N, D), or None for zero; `p_final` takes the state
    after the last one. With REVERSE the chunks are passed from the last to the first, for the adjoint.
    """
    DTYPE: tl.constexpr = p_A.dtype.element_ty
    blocks = tl.cdiv(dim, BLOCK_D)
    i_task = tl.program_id(0).to(tl.int64)
    i_n = (i_task // blocks) % states
    i_bk = i_task // blocks // states
    o_d = (i_task % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = o_d < dim
    A = tl.load(p_A + (i_bk % groups * states + i_n) * dim + o_d, mask=in_d, other=0.0) * LOG2_E
    if p_initial is not None:
        h = tl.load(p_initial + (i_bk * states + i_n) * dim + o_d, mask=in_d, other=0.0)
    else:
        h = tl.zeros((BLOCK_D,), dtype=DTYPE)
    p_states += (i_bk * chunks * states + i_n) * dim
    p_dt_sums += i_bk * chunks * dim

    i_j = 0
    while i_j < chunks:
        # The loads of a block of chunks are independent.
        decays = ()
        added = ()
        offsets = ()
        masks = ()
        for s in tl.static_range(BLOCK_J):
            i_s = tl.minimum(i_j + s, chunks - 1)
            o_j = (chunks - 1 - i_s if REVERSE else i_s).to(tl.int64)
            mask = in_d & (i_j + s < chunks)
            offsets = offsets + (o_j,)
            masks = masks + (mask,)
            decays = decays + (tl.load(p_dt_sums + o_j * dim + o_d, mask=mask, other=0.0) * A,)
            added = added + (tl.load(p_states + o_j * states * dim + o_d, mask=mask, other=0.0),)
        for s in tl.static_range(BLOCK_J):
            tl.store(p_states + offsets[s] * states * dim + o_d, h, mask=masks[s])
            h = tl.exp2(decays[s]) * h + added[s]
        i_j += BLOCK_J
    if p_final is not None:
        tl.store(p_final + (i_bk * states + i_n) * dim + o_d, h, mask=in_d)


@triton.jit(do_not_specialize=VARYING)
def chunk_adjoint_kernel(
    p_dt,
    p_A,
    p_C,
    p_bias,
    p_z,
    p_order,
    p_grad_out,
    p_adjoint,
    dt_strides,
    C_strides,
    z_strides,
    grad_out_strides,
    length,
    groups,
    dim,
    states,
    chunk,
    chunks,
    reversed_groups,
    SOFTPLUS: tl.constexpr,
    FAST_MATH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scan the adjoint of one chunk from its end, from zero; `p_adjoint` takes what leaves its start."""
    DTYPE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = locate_program(dim, chunks, 0, groups, tl.program_id(0), BLOCK_D)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    in_d = o_d < dim
    in_n = o_n < states
    o_nd = o_n[:, None] * dim + o_d[None, :]
    in_nd = in_n[:, None] & in_d[None, :]

    p_dt += i_b * dt_strides[0] + i_k * dt_strides[2]
    p_C += i_b * C_strides[0] + i_k * C_strides[2]
    o_C = o_n * C_strides[3]
    p_grad_out += i_b * grad_out_strides[0] + i_k * grad_out_strides[2]
    if p_z is not None:
        p_z += i_b * z_strides[0] + i_k * z_strides[2]
    A = tl.load(p_A + i_k * states * dim + o_nd, mask=in_nd, other=0.0) * LOG2_E
    bias = load_parameter(None if p_bias is None else p_bias + i_k * dim, o_d, in_d, BLOCK_D, DTYPE)
    adjoint = tl.zeros((BLOCK_N, BLOCK_D), dtype=DTYPE)

    i_t = tl.minimum((i_j + 1) * chunk, length) - 1
    while i_t >= i_j * chunk:
        i_row = locate_row(p_order, i_t, i_k, length, reversed_groups)
        dt = load_row(row_pointer(p_dt, i_row, dt_strides[1]), o_d, in_d, DTYPE) + bias
        C = load_row(row_pointer(p_C, i_row, C_strides[1]), o_C, in_n, DTYPE)
        grad = load_row(row_pointer(p_grad_out, i_row, grad_out_strides[1]), o_d, in_d, DTYPE)
        if p_z is not None:
            z = load_row(row_pointer(p_z, i_row, z_strides[1]), o_d, in_d, DTYPE)
            grad *= z * sigmoid(z)
        if SOFTPLUS:
            dt = softplus(dt, FAST_MATH)
        adjoint = tl.exp2(dt[None, :] * A) * (adjoint + grad[None, :] * C[:, None])
        i_t -= 1

    i_chunk = (i_b * groups + i_k) * chunks + i_j
    tl.store(p_adjoint + i_chunk * states * dim + o_nd, adjoint, mask=in_nd)


@triton.jit(do_not_specialize=VARYING)
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
    p_saved,
    p_adjoint,
    p_scratch,
    p_grad_x,
    p_grad_dt,
    p_grad_z,
    p_grad_B,
    p_grad_C,
    p_grad_parameters,
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
    save_every,
    saves,
    reversed_groups,
    first_group,
    launched_groups,
    SOFTPLUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FAST_MATH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute all gradients of chunks, each from its last step to its first.

    `p_saved` (B, K, saves, N, D) holds the state before every `save_every`-th step; a chunk is a multiple of
    that. From there the states are recomputed: first those at every TILE-th step, into the scratch of the
    program, (programs, save_every / TILE, BLOCK_N, BLOCK_D), then those of one tile, in registers.
    `p_adjoint` (B, K, J, N, D) is the adjoint that enters the end of each chunk. The gradients of dt and z
    are contiguous, (B, L, K, D). Sums beyond a program are left to the caller: the gradients of B and C are
    (blocks of channels, B, L, K, N), those of A, D and the bias (B, J, K, N + 2, D).
    """
    DTYPE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = locate_program(dim, chunks, first_group, launched_groups, tl.program_id(0), BLOCK_D)
    o_block = tl.arange(0, BLOCK_D)
    o_d = i_d * BLOCK_D + o_block
    o_n = tl.arange(0, BLOCK_N)
    in_d = o_d < dim
    in_n = o_n < states
    o_nd = o_n[:, None] * dim + o_d[None, :]
    in_nd = in_n[:, None] & in_d[None, :]
    i_bk = i_b * groups + i_k

    p_x += i_b * x_strides[0] + i_k * x_strides[2]
    p_dt += i_b * dt_strides[0] + i_k * dt_strides[2]
    p_B += i_b * B_strides[0] + i_k * B_strides[2]
    o_B = o_n * B_strides[3]
    p_C += i_b * C_strides[0] + i_k * C_strides[2]
    o_C = o_n * C_strides[3]
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
    o_scratch = o_n[:, None] * BLOCK_D + o_block[None, :]
    p_scratch += tl.program_id(0).to(tl.int64) * (save_every // TILE) * BLOCK_N * BLOCK_D

    A = tl.load(p_A + i_k * states * dim + o_nd, mask=in_nd, other=0.0) * LOG2_E
    bias = load_parameter(None if p_bias is None else p_bias + i_k * dim, o_d, in_d, BLOCK_D, DTYPE)
    skip = load_parameter(None if p_D is None else p_D + i_k * dim, o_d, in_d, BLOCK_D, DTYPE)
    adjoint = tl.load(p_adjoint + (i_bk * chunks + i_j) * states * dim + o_nd, mask=in_nd, other=0.0)
    grad_A = tl.zeros((BLOCK_N, BLOCK_D), dtype=DTYPE)
    grad_D = tl.zeros((BLOCK_D,), dtype=DTYPE)
    grad_bias = tl.zeros((BLOCK_D,), dtype=DTYPE)

    start = i_j * chunk
    stop = tl.minimum(start + chunk, length)
    i_save = (stop - 1) // save_every
    while i_save * save_every >= start:
        begin = i_save * save_every
        end = tl.minimum(begin + save_every, stop)
        h = tl.load(p_saved + (i_bk * saves + i_save) * states * dim + o_nd, mask=in_nd, other=0.0)
        i_t = begin
        while i_t < end:
            tl.store(p_scratch + (i_t - begin) // TILE * BLOCK_N * BLOCK_D + o_scratch, h)
            for s in tl.static_range(TILE):
                inside = i_t + s < end
                in_row = in_d & inside
                i_row = locate_row(p_order, tl.minimum(i_t + s, end - 1), i_k, length, reversed_groups)
                x = load_row(row_pointer(p_x, i_row, x_strides[1]), o_d, in_row, DTYPE)
                dt = load_row(row_pointer(p_dt, i_row, dt_strides[1]), o_d, in_row, DTYPE) + bias
                B = load_row(row_pointer(p_B, i_row, B_strides[1]), o_B, in_n & inside, DTYPE)
                if SOFTPLUS:
                    dt = softplus(dt, FAST_MATH)
                h = tl.exp2(dt[None, :] * A) * h + (dt * x)[None, :] * B[:, None]
                if p_z is not None:
                    C = load_row(row_pointer(p_C, i_row, C_strides[1]), o_C, in_n & inside, DTYPE)
                    grad = load_row(row_pointer(p_grad_out, i_row, grad_out_strides[1]), o_d, in_row, DTYPE)
                    z = load_row(row_pointer(p_z, i_row, z_strides[1]), o_d, in_row, DTYPE)
                    gate = sigmoid(z)
                    y = tl.sum(h * C[:, None], 0) + skip * x
                    grad_z = grad * y * gate * (1.0 + z * (1.0 - gate))
                    p_row = row_pointer(p_grad_z, i_row, groups * dim) + o_d
                    tl.store(p_row, grad_z.to(p_grad_z.dtype.element_ty), mask=in_row)
            i_t += TILE
        # A thread may load what another thread of the program has stored.
        tl.debug_barrier()

        i_t -= TILE
        while i_t >= begin:
            h = tl.load(p_scratch + (i_t - begin) // TILE * BLOCK_N * BLOCK_D + o_scratch)
            # The state before each step of the tile. Only the last tile may have steps beyond the end:
            # their dt is zero, which keeps the state and its adjoint.
            befores = (h,)
            rows = ()
            masks_d = ()
            masks_n = ()
            dts = ()
            for s in tl.static_range(TILE):
                inside = i_t + s < end
                in_row = in_d & inside
                i_row = locate_row(p_order, tl.minimum(i_t + s, end - 1), i_k, length, reversed_groups)
                x = load_row(row_pointer(p_x, i_row, x_strides[1]), o_d, in_row, DTYPE)
                dt = load_row(row_pointer(p_dt, i_row, dt_strides[1]), o_d, in_row, DTYPE) + bias
                B = load_row(row_pointer(p_B, i_row, B_strides[1]), o_B, in_n & inside, DTYPE)
                if SOFTPLUS:
                    dt = softplus(dt, FAST_MATH)
                dt = tl.where(in_row, dt, 0.0)
                if s < TILE - 1:
                    h = tl.exp2(dt[None, :] * A) * h + (dt * x)[None, :] * B[:, None]
                    befores = befores + (h,)
                rows = rows + (i_row,)
                masks_d = masks_d + (in_row,)
                masks_n = masks_n + (in_n & inside,)
                dts = dts + (dt,)

            for s in tl.static_range(TILE - 1, -1, -1):
                i_row = rows[s]
                dt = dts[s]
                # In the cache; in registers they would displace states.
                x = load_row(row_pointer(p_x, i_row, x_strides[1]), o_d, masks_d[s], DTYPE)
                B = load_row(row_pointer(p_B, i_row, B_strides[1]), o_B, masks_n[s], DTYPE)
                raw = load_row(row_pointer(p_dt, i_row, dt_strides[1]), o_d, masks_d[s], DTYPE) + bias
                C = load_row(row_pointer(p_C, i_row, C_strides[1]), o_C, masks_n[s], DTYPE)
                grad = load_row(row_pointer(p_grad_out, i_row, grad_out_strides[1]), o_d, masks_d[s], DTYPE)
                decay = tl.exp2(dt[None, :] * A)
                kept = decay * befores[s]
                dtx = dt * x
                h = kept + dtx[None, :] * B[:, None]
                if p_z is not None:
                    z = load_row(row_pointer(p_z, i_row, z_strides[1]), o_d, masks_d[s], DTYPE)
                    grad *= z * sigmoid(z)
                p_row = row_pointer(p_grad_C, i_row, groups * states) + o_n
                tl.store(p_row, tl.sum(grad[None, :] * h, 1), mask=masks_n[s])
                adjoint += grad[None, :] * C[:, None]
                p_row = row_pointer(p_grad_B, i_row, groups * states) + o_n
                tl.store(p_row, tl.sum(adjoint * dtx[None, :], 1), mask=masks_n[s])
                grad_dtx = tl.sum(adjoint * B[:, None], 0)
                # A is scaled by log2(e), so the sum over the states is scaled back.
                by_decay = adjoint * kept
                grad_dt = grad_dtx * x + tl.sum(by_decay * A, 0) * LN_2
                grad_A += by_decay * dt[None, :]
                adjoint *= decay
                if SOFTPLUS:
                    grad_dt = tl.where(raw > 20.0, grad_dt, grad_dt * sigmoid(raw))
                grad_dt = tl.where(masks_d[s], grad_dt, 0.0)
                grad_bias += grad_dt
                grad_D += grad * x
                grad_x = grad_dtx * dt + skip * grad
                p_row = row_pointer(p_grad_x, i_row, grad_x_strides[1]) + o_d
                if ACCUMULATE:
                    grad_x += tl.load(p_row, mask=masks_d[s], other=0.0).to(DTYPE)
                tl.store(p_row, grad_x.to(p_grad_x.dtype.element_ty), mask=masks_d[s])
                p_row = row_pointer(p_grad_dt, i_row, groups * dim) + o_d
                tl.store(p_row, grad_dt.to(p_grad_dt.dtype.element_ty), mask=masks_d[s])
            i_t -= TILE
        # The next stretch of steps overwrites the scratch.
        tl.debug_barrier()
        i_save -= 1

    p_grad_parameters += ((i_b * chunks + i_j) * groups + i_k) * (states + 2) * dim
    tl.store(p_grad_parameters + o_nd, grad_A, mask=in_nd)
    tl.store(p_grad_parameters + states * dim + o_d, grad_D, mask=in_d)
    tl.store(p_grad_parameters + (states + 1) * dim + o_d, grad_bias, mask=in_d)
