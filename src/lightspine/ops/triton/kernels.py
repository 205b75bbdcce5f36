"""Triton kernels of the selective scan over groups of channels; `scan_backward_kernel.py` has the gradients.

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
    "groups",
    "chunk",
    "chunks",
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
def sigmoid(x, FAST_MATH: tl.constexpr = False):
    """Return 1 / (1 + e^-x)."""
    one_plus = 1.0 + tl.exp2(x * -LOG2_E)
    # Triton's division scales denormal numbers, which do not occur here.
    return libdevice.fast_dividef(1.0, one_plus) if FAST_MATH else 1.0 / one_plus


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

    Writes whichever is given: the output `p_out`, the state after the chunk `p_end` and the sum of dt over
    the chunk `p_dt_sum`. With ACCUMULATE the output is added to what `p_out` holds.
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
                y *= z * sigmoid(z, FAST_MATH)
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
    """Scan the adjoint of one chunk from its end, from zero; `p_adjoint` takes what leaves its start.

    Nothing needs what leaves the start of the first chunk, which is not scanned.
    """
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
    first = tl.where(i_j == 0, length, i_j * chunk)
    while i_t >= first:
        i_row = locate_row(p_order, i_t, i_k, length, reversed_groups)
        dt = load_row(row_pointer(p_dt, i_row, dt_strides[1]), o_d, in_d, DTYPE) + bias
        C = load_row(row_pointer(p_C, i_row, C_strides[1]), o_C, in_n, DTYPE)
        grad = load_row(row_pointer(p_grad_out, i_row, grad_out_strides[1]), o_d, in_d, DTYPE)
        if p_z is not None:
            z = load_row(row_pointer(p_z, i_row, z_strides[1]), o_d, in_d, DTYPE)
            grad *= z * sigmoid(z, FAST_MATH)
        if SOFTPLUS:
            dt = softplus(dt, FAST_MATH)
        adjoint = tl.exp2(dt[None, :] * A) * (adjoint + grad[None, :] * C[:, None])
        i_t -= 1

    i_chunk = (i_b * groups + i_k) * chunks + i_j
    tl.store(p_adjoint + i_chunk * states * dim + o_nd, adjoint, mask=in_nd)
