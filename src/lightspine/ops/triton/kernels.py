"""Triton kernels of the selective scan: the chunked algorithm drawn in `ops/README.md`.

| kernel                   | computes                                                              |
| ------------------------ | --------------------------------------------------------------------- |
| `chunk_scan_fwd_kernel`  | outputs of a chunk from the state at its start, or only its end state |
| `state_passing_kernel`   | state, or its gradient, at every chunk boundary, one after the other  |
| `chunk_state_bwd_kernel` | gradient of the state at the start of a chunk                         |
| `chunk_scan_bwd_kernel`  | gradients of all inputs in a chunk                                    |

A program is one warp. It holds BLOCK_D channels with all their states, (BLOCK_N, BLOCK_D), and processes TILE
positions at a time in unrolled code, so that the loads of a whole tile are in flight together.

Names: `i_*` index, `o_*` offsets, `p_*` pointer, `b_*` block in registers; b image, k group, j chunk, d
channels, n states, t position in scan order. Indices are widened to 64 bits before they are multiplied by a
stride.

Tensors of a sequence, (B, L, K, D) or (B, L, K, N), are passed as a pointer and strides in elements; channels
are contiguous. Tensors of chunks are contiguous and have the dtype of the state: states (B, K, J, N, D), sums
of dt (B, K, J, D). A missing optional tensor is None.
"""

# Triton's language: untyped, no starred tuples, compile-time branches.
# mypy: ignore-errors
# ruff: noqa: C901, RUF005

import triton
import triton.language as tl

# Sizes that differ between images and between launches: do not compile a kernel for each value.
DO_NOT_SPECIALIZE = ("length", "groups", "batch", "chunk", "chunks", "first", "first_group", "launched")


@triton.jit
def program_indices(first, dim, chunks, first_group, launched, BLOCK_D: tl.constexpr):
    """Return image, group, chunk and channel block of this program; neighboring programs share a chunk."""
    i_task = tl.program_id(0).to(tl.int64) + first
    blocks = tl.cdiv(dim, BLOCK_D)
    i_rest = i_task // blocks
    i_group = i_rest // chunks
    return i_group // launched, first_group + i_group % launched, i_rest % chunks, i_task % blocks


@triton.jit
def tile_positions(p_order, i_k, i_t, stop, length, dim, states, REVERSE: tl.constexpr, TILE: tl.constexpr):
    """Return position, number of channels and number of states for each of the TILE positions from i_t on.

    Beyond `stop` the numbers are 0, which masks all loads and stores; the position is still valid.
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
def load_tile(p_rows, stride, positions, dims, o_d, STATE: tl.constexpr, TILE: tl.constexpr):
    """Load the channels at each position and convert them to STATE; zero where masked."""
    rows = ()
    for s in tl.static_range(TILE):
        row = tl.load(p_rows + positions[s] * stride + o_d, mask=o_d < dims[s], other=0.0)
        rows = rows + (row.to(STATE),)
    return rows


@triton.jit
def compute_dt(b_deltas, b_bias, dims, o_d, DELTA_SOFTPLUS: tl.constexpr, TILE: tl.constexpr):
    """Add the bias to delta and apply softplus where enabled; zero where masked."""
    b_dts = ()
    for s in tl.static_range(TILE):
        b_dt = b_deltas[s] + b_bias
        if DELTA_SOFTPLUS:
            b_dt = softplus(b_dt)
        # dt = 0 keeps the state.
        b_dts = b_dts + (tl.where(o_d < dims[s], b_dt, 0.0),)
    return b_dts


@triton.jit
def load_channels(p_row, o_d, dim, BLOCK_D: tl.constexpr, STATE: tl.constexpr):
    """Load one row of channels, zeros for a missing row."""
    if p_row is not None:
        return tl.load(p_row + o_d, mask=o_d < dim, other=0.0)
    else:
        return tl.zeros((BLOCK_D,), dtype=STATE)


@triton.jit
def softplus(x):
    """Return log(1 + e^x); x itself above 20, as PyTorch does."""
    small = tl.exp(-tl.abs(x))
    # 1 + small rounds; scaling by small / (rounded sum - 1) corrects its logarithm.
    whole = 1.0 + small
    rounded = whole - 1.0
    logarithm = tl.where(
        rounded > 0.0, tl.log(whole) * (small / tl.where(rounded > 0.0, rounded, 1.0)), small
    )
    return tl.where(x > 20.0, x, tl.where(x > 0.0, x, 0.0) + logarithm)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^-x); only exponentials of negative numbers are taken, so none overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def chunk_scan_fwd_kernel(
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
    p_dt_sum,
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
    """Scan one chunk from the state `p_start`, or from zero, and write the outputs or the state at its end.

    A is (K, N, D), D and the bias are (K, D), all in the dtype of the state. `p_end` receives the state after
    the chunk, `p_dt_sum` the sum of its dt. With ADDS the output is added to what `p_out` holds.
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = program_indices(0, dim, chunks, first_group, launched, BLOCK_D)
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
    b_dt_sum = tl.zeros((BLOCK_D,), dtype=STATE)

    i_t = i_j * chunk
    stop = tl.minimum(i_t + chunk, length)
    while i_t < stop:
        # All loads of the tile are issued before its first store, so that they overlap.
        positions, dims, counts = tile_positions(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_xs = load_tile(p_x, x_strides[1], positions, dims, o_d, STATE, TILE)
        b_deltas = load_tile(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        if p_out is not None:
            if p_z is not None:
                b_zs = load_tile(p_z, z_strides[1], positions, dims, o_d, STATE, TILE)
            if ADDS:
                b_outs = load_tile(p_out, out_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = compute_dt(b_deltas, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
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
                b_dt_sum += b_dts[s]
        if p_out is not None:
            for s in tl.static_range(TILE):
                p_row = p_out + positions[s] * out_strides[1] + o_d
                tl.store(p_row, b_ys[s].to(p_out.dtype.element_ty), mask=o_d < dims[s])
        i_t += TILE

    if p_end is not None:
        tl.store(p_end + i_chunk * states * dim + o_nd, b_h, mask=in_nd)
    if p_dt_sum is not None:
        tl.store(p_dt_sum + i_chunk * dim + o_d, b_dt_sum, mask=o_d < dim)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def state_passing_kernel(
    p_states,
    p_dt_sums,
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
    """Replace the state that each chunk adds by the state that it starts from, one chunk after the other.

    The decay over a chunk is exp(A * sum of its dt); nothing is divided by a decay. A program handles one
    state of BLOCK_D channels. `p_first` is the state before the first chunk, (B, K, N, D), or None for zero;
    `p_last` receives the state after the last one. With REVERSE the gradient of the state is passed from the
    last chunk to the first.
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
    p_dt_sums += i_bk * chunks * dim

    i_j = 0
    while i_j < chunks:
        offsets = ()
        limits = ()
        for s in tl.static_range(TILE):
            i_s = tl.minimum(i_j + s, chunks - 1)
            offsets = offsets + ((chunks - 1 - i_s if REVERSE else i_s).to(tl.int64),)
            limits = limits + (tl.where(i_j + s < chunks, dim, 0),)
        b_sums = load_tile(p_dt_sums, dim, offsets, limits, o_d, p_A.dtype.element_ty, TILE)
        b_ends = load_tile(p_states, states * dim, offsets, limits, o_d, p_A.dtype.element_ty, TILE)
        for s in tl.static_range(TILE):
            tl.store(p_states + offsets[s] * states * dim + o_d, b_h, mask=o_d < limits[s])
            b_h = tl.exp(b_sums[s] * b_A) * b_h + b_ends[s]
        i_j += TILE
    if p_last is not None:
        tl.store(p_last + (i_bk * states + i_n) * dim + o_d, b_h, mask=in_d)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def chunk_state_bwd_kernel(
    p_delta,
    p_A,
    p_C,
    p_bias,
    p_z,
    p_order,
    p_grad_out,
    p_grad_start,
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
    """Scan one chunk in reverse and write the gradient of the state before it, from zero after it."""
    STATE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = program_indices(0, dim, chunks, 0, groups, BLOCK_D)
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
    b_grad_h = tl.zeros((BLOCK_N, BLOCK_D), dtype=STATE)

    stop = tl.minimum((i_j + 1) * chunk, length)
    # A chunk consists of whole tiles, except beyond the end of the sequence.
    i_t = i_j * chunk + (stop - 1 - i_j * chunk) // TILE * TILE
    while i_t >= i_j * chunk:
        positions, dims, counts = tile_positions(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_deltas = load_tile(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        b_grads = load_tile(p_grad_out, grad_out_strides[1], positions, dims, o_d, STATE, TILE)
        if p_z is not None:
            b_zs = load_tile(p_z, z_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = compute_dt(b_deltas, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
        for s in tl.static_range(TILE - 1, -1, -1):
            b_grad = b_grads[s]
            if p_z is not None:
                b_grad = b_grad * (b_zs[s] * sigmoid(b_zs[s]))
            b_C = tl.load(p_C + positions[s] * C_strides[1] + o_C, mask=o_n < counts[s], other=0.0).to(STATE)
            b_grad_h += b_grad[None, :] * b_C[:, None]
            b_grad_h *= tl.exp(b_dts[s][None, :] * b_A)
        i_t -= TILE

    i_chunk = (i_b * groups + i_k) * chunks + i_j
    tl.store(p_grad_start + i_chunk * states * dim + o_nd, b_grad_h, mask=in_nd)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def chunk_scan_bwd_kernel(
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
    p_grad_end,
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
    """Write all gradients of one chunk from the state at its start and the gradient of the state at its end.

    `p_start` is (B, K, J, N, D), None for zeros; `p_grad_end` likewise, never None. `p_tiles` is scratch
    memory for the states at the starts of the tiles, (programs of the launch, tiles of a chunk, N, BLOCK_D).
    The gradients of delta and z are contiguous, (B, L, K, D). The caller sums over programs: the gradients of
    B and C are (channel blocks, B, L, K, N), those of A, D and the bias (B, J, K, N + 2, D).
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    i_b, i_k, i_j, i_d = program_indices(first, dim, chunks, first_group, launched, BLOCK_D)
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
    # Row of this image and group in contiguous tensors (B, L, K, ...).
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
    b_grad_h = tl.load(p_grad_end + i_chunk * states * dim + o_nd, mask=in_nd, other=0.0)
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
        positions, dims, counts = tile_positions(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_xs = load_tile(p_x, x_strides[1], positions, dims, o_d, STATE, TILE)
        b_deltas = load_tile(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = compute_dt(b_deltas, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
        for s in tl.static_range(TILE):
            b_B = tl.load(p_B + positions[s] * B_strides[1] + o_B, mask=o_n < counts[s], other=0.0).to(STATE)
            b_h = tl.exp(b_dts[s][None, :] * b_A) * b_h + (b_dts[s] * b_xs[s])[None, :] * b_B[:, None]
        i_t += TILE
    # Threads read what other threads of the program have written.
    tl.debug_barrier()

    while i_t >= start:
        positions, dims, counts = tile_positions(p_order, i_k, i_t, stop, length, dim, states, REVERSE, TILE)
        b_xs = load_tile(p_x, x_strides[1], positions, dims, o_d, STATE, TILE)
        b_deltas = load_tile(p_delta, delta_strides[1], positions, dims, o_d, STATE, TILE)
        b_grads = load_tile(p_grad_out, grad_out_strides[1], positions, dims, o_d, STATE, TILE)
        if p_z is not None:
            b_zs = load_tile(p_z, z_strides[1], positions, dims, o_d, STATE, TILE)
        if ADDS:
            b_grad_xs = load_tile(p_grad_x, grad_x_strides[1], positions, dims, o_d, STATE, TILE)
        b_dts = compute_dt(b_deltas, b_bias, dims, o_d, DELTA_SOFTPLUS, TILE)
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
                b_sigmoid = sigmoid(b_zs[s])
                b_y = tl.sum(b_states[s + 1] * b_C[:, None], 0) + b_skip * b_xs[s]
                b_grad_gate = b_grad * b_y * b_sigmoid * (1.0 + b_zs[s] * (1.0 - b_sigmoid))
                p_row = p_grad_z + positions[s] * groups * dim + o_d
                tl.store(p_row, b_grad_gate.to(p_grad_z.dtype.element_ty), mask=in_row)
                b_grad = b_grad * (b_zs[s] * b_sigmoid)
            b_grad_h_t = b_grad_h + b_grad[None, :] * b_C[:, None]
            b_grad_h = b_grad_h_t * tl.exp(b_dts[s][None, :] * b_A)
            b_grad_exponent = b_grad_h * b_states[s]
            b_grad_dt_x = tl.sum(b_grad_h_t * b_B[:, None], 0)
            b_grad_dt = b_grad_dt_x * b_xs[s] + tl.sum(b_grad_exponent * b_A, 0)
            if DELTA_SOFTPLUS:
                b_delta = b_deltas[s] + b_bias
                b_grad_dt = tl.where(b_delta > 20.0, b_grad_dt, b_grad_dt * sigmoid(b_delta))
            b_grad_dt = tl.where(in_row, b_grad_dt, 0.0)
            b_grad_A += b_grad_exponent * b_dts[s][None, :]
            b_grad_D += b_grad * b_xs[s]
            b_grad_bias += b_grad_dt

            o_row = positions[s] * groups
            in_projection = o_n < counts[s]
            b_grad_B = tl.sum(b_grad_h_t * (b_dts[s] * b_xs[s])[None, :], 1)
            tl.store(p_grad_B + o_row * states + o_n, b_grad_B, mask=in_projection)
            b_grad_C = tl.sum(b_grad[None, :] * b_states[s + 1], 1)
            tl.store(p_grad_C + o_row * states + o_n, b_grad_C, mask=in_projection)
            b_grad_x = b_grad_dt_x * b_dts[s] + b_skip * b_grad
            if ADDS:
                b_grad_x += b_grad_xs[s]
            p_row = p_grad_x + positions[s] * grad_x_strides[1] + o_d
            tl.store(p_row, b_grad_x.to(p_grad_x.dtype.element_ty), mask=in_row)
            p_row = p_grad_delta + o_row * dim + o_d
            tl.store(p_row, b_grad_dt.to(p_grad_delta.dtype.element_ty), mask=in_row)
        i_t -= TILE
        p_tile = p_tiles + (i_t - start) // TILE * states * BLOCK_D
        b_h = tl.load(p_tile + o_tile, mask=o_n[:, None] < tl.where(i_t >= start, states, 0), other=0.0)

    p_grad_parameters += ((i_b * chunks + i_j) * groups + i_k) * (states + 2) * dim
    tl.store(p_grad_parameters + o_nd, b_grad_A, mask=in_nd)
    tl.store(p_grad_parameters + states * dim + o_d, b_grad_D, mask=in_d)
    tl.store(p_grad_parameters + (states + 1) * dim + o_d, b_grad_bias, mask=in_d)
