"""Kernels of the scan over a map with one state per channel (N = 1), forward and backward.

The steps are projected inside: the kernels read the map, the low-rank rows and the weights, and never write
the steps. README.md in this folder derives the formulas and draws the cut.

A program is one warp. It owns BLOCK_D = 32 VEC channels and a chunk of the map of one or more images, and
takes TILE steps at a time: a tile is (TILE, BLOCK_D), and a thread holds all steps of VEC neighboring
channels.

Names: `p_*` pointer, `o_*` offsets, `i_*` index, `b_*` block in registers; image b, direction k, chunk j,
position t in a chunk, channel d, rank r. K directions come as `families` of `pairs` (1 or 2): direction
f + families walks backwards over what direction f walks forwards, so that both meet in the same chunk.

Everything is counted in base 2: s = softplus(v) / ln 2 with v in units of log2(e), and the state is h / ln 2,
so that decay = 2^(s A), h' = decay h + s B x, y = (C ln 2) h'.
"""

# Kernels are written in Triton's language: untyped, and not executed by Python.
# mypy: ignore-errors

import triton.language as tl

from lightspine.ops.triton.device_functions import LN2, LOG2E, softplus2
from lightspine.ops.triton.tile_language import (
    adjoint_scan,
    copy_layout,
    device_function,
    exp2,
    gl,
    halves,
    jit,
    linear_scan,
    mma,
    pair_sums,
    prevent_hoisting,
    share,
    shared_line,
    shared_tile,
    synchronize,
)

# Integers that differ between stages, batches and launches: none gets a kernel of its own.
CHANGING = (
    "length",
    "dim",
    "rank",
    "first",
    "count",
    "families",
    "pairs",
    "chunk",
    "chunks",
    "x_pixel",
    "x_image",
    "weight_strides",
    "low_pixel",
    "low_image",
    "grad_pixel",
    "grad_image",
    "has_start",
    "keeps",
    "images",
    "batch",
    "adjoint",
    "directions",
)
# Makes softplus exactly 0 for a step that is none, so that it keeps the state.
_NO_STEP = tl.constexpr(-30000.0)


@device_function
def _direction(i, families, pairs):
    """Return the i-th direction in the order of the launches, its family, and whether it walks backwards."""
    family = i // pairs
    backwards = i % pairs
    return family + backwards * families, family, backwards


@device_function
def _positions(p_order, start, stop, t0, backwards, T: tl.constexpr, LINE: tl.constexpr):
    """Return the pixels of T steps from step t0 of a chunk on, in the layout LINE; the last one repeats."""
    o_t = gl.minimum(t0 + gl.arange(0, T, layout=LINE), stop - start - 1)
    return gl.load(p_order + gl.where(backwards > 0, stop - 1 - o_t, start + o_t))


@device_function
def _share_weight(
    p_W,
    strides,
    dim,
    rank,
    i_d,
    DTYPE: tl.constexpr,
    RANK_SLABS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Put the weight of dt of a direction into shared memory, (RANK_SLABS, 16, BLOCK_D), padded with zeros.

    Row `rank`, in the last slab, is what turns a step into none; see `_project`.
    """
    weight = shared_tile(DTYPE, 16, BLOCK_D, RANK_SLABS)
    o_r = gl.arange(0, 16, layout=gl.SliceLayout(1, TILE))
    # As loop invariants of the caller these offsets would need registers.
    o_d = prevent_hoisting(i_d) * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, TILE))
    for i_slab in tl.static_range(RANK_SLABS):
        inside = (o_d < dim)[None, :]
        if i_slab == RANK_SLABS - 1:
            inside = (o_r < rank)[:, None] & inside
        b_W = gl.load(p_W + o_d[None, :] * strides[2] + o_r[:, None] * strides[1], mask=inside, other=0.0)
        b_W = b_W.to(DTYPE)
        if i_slab == RANK_SLABS - 1:
            b_W = gl.where((o_r == rank)[:, None], gl.full([16, BLOCK_D], _NO_STEP, DTYPE, layout=TILE), b_W)
        weight.index(i_slab).store(b_W)
        o_r += 16
    return weight


@device_function
def _project(
    p_low, low_pixel, pixels, rank, t0, steps, weight, acc, RANK_SLABS: tl.constexpr, MMA: tl.constexpr
):
    """Return the product of T low-rank rows and the step weight plus `acc`, in slabs of 16 ranks.

    A step beyond the last one gets so low a number that softplus makes it exactly zero.
    """
    T: tl.constexpr = acc.shape[0]
    K_WIDTH: tl.constexpr = 4 // (p_low.dtype.element_ty.primitive_bitwidth // 8)
    LOW: tl.constexpr = gl.DotOperandLayout(0, MMA, K_WIDTH)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, MMA, K_WIDTH)
    o_t = t0 + gl.arange(0, T, layout=gl.SliceLayout(1, LOW))
    o_r = gl.arange(0, 16, layout=gl.SliceLayout(0, LOW))
    o_low = gl.convert_layout(pixels, gl.SliceLayout(1, LOW)) * low_pixel
    for i_slab in tl.static_range(RANK_SLABS - 1):
        b_low = gl.load(p_low + o_low[:, None] + (i_slab * 16 + o_r)[None, :])
        acc = mma(b_low, weight.index(i_slab).load(RIGHT), acc)
    o_r += (RANK_SLABS - 1) * 16
    b_low = gl.load(p_low + o_low[:, None] + o_r[None, :], mask=(o_r < rank)[None, :], other=0.0)
    none = (o_r == rank)[None, :] & (o_t >= steps)[:, None]
    b_low = gl.where(none, gl.full([T, 16], 1.0, p_low.dtype.element_ty, layout=LOW), b_low)
    return mma(b_low, weight.index(RANK_SLABS - 1).load(RIGHT), acc)


@device_function
def _load_map(p_map, pixels, stride, t0, steps, i_d, dim, COPY: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return BLOCK_D channels of T pixels in the layout COPY, zeros for channels and steps that are none."""
    o_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, COPY))
    o_pixel = gl.convert_layout(pixels, gl.SliceLayout(1, COPY)) * stride
    o_t = t0 + gl.arange(0, pixels.shape[0], layout=gl.SliceLayout(1, COPY))
    inside = (o_t < steps)[:, None] & (o_d < dim)[None, :]
    return gl.load(p_map + o_pixel[:, None] + o_d[None, :], mask=inside, other=0.0)


@jit(do_not_specialize=CHANGING)
def fused_cross_scan_fwd_kernel(
    p_x,
    p_low,
    p_W,
    p_A,
    p_D,
    p_bias,
    p_order,
    p_start,
    p_kept,
    p_out,
    length,
    dim,
    rank,
    first,
    count,
    families,
    pairs,
    chunk,
    chunks,
    x_pixel,
    x_image,
    weight_strides,
    low_pixel,
    low_image,
    has_start,
    keeps,
    RANK_SLABS: tl.constexpr,
    VEC: tl.constexpr,
    T: tl.constexpr,
):
    """Scan one chunk in `count` directions from the `first` on and write the sum over the directions.

    All but direction 0 add to what is in `p_out`, (B, L, D) contiguous. With `has_start` the states that
    enter the chunk are read from `p_start`, (B, K, J, D) in the order of the walk; with `keeps` the
    states that enter each 8 steps are written to `p_kept`, (B, K, 2 ceil(L / 16), D) in the order of the
    map's chunks.
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    LOW_TYPE: tl.constexpr = p_low.dtype.element_ty
    ACCURATE: tl.constexpr = gl.float32 == LOW_TYPE
    BLOCK_D: tl.constexpr = 32 * VEC
    TILE: tl.constexpr = gl.BlockedLayout([T, VEC], [1, 32], [1, 1], [1, 0])
    LINE: tl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    STEPS: tl.constexpr = gl.SliceLayout(1, TILE)

    # Multiples of VEC, said so that loads and stores are VEC wide.
    dim = dim // VEC * VEC
    x_pixel = x_pixel // VEC * VEC
    blocks = gl.cdiv(dim, BLOCK_D)
    i_task = gl.program_id(0)
    i_d = i_task % blocks
    i_j = i_task // blocks % chunks
    i_b = (i_task // blocks // chunks).to(gl.int64)
    directions = families * pairs
    o_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, TILE))
    in_d = o_d < dim
    start = i_j * chunk
    stop = gl.minimum(start + chunk, length)
    p_x += i_b * (x_image // VEC * VEC)
    p_low += i_b * low_image
    p_out += i_b * length * dim

    for i in range(first, first + count):
        i_k, i_f, backwards = _direction(i, families, pairs)
        weight = _share_weight(
            p_W + i_k * weight_strides[0], weight_strides, dim, rank, i_d, LOW_TYPE, RANK_SLABS, BLOCK_D, TILE
        )
        b_A = gl.load(p_A + i_k * dim + o_d, mask=in_d, other=0.0)
        b_D = gl.load(p_D + i_k * dim + o_d, mask=in_d, other=0.0)
        b_bias = gl.load(p_bias + i_k * dim + o_d, mask=in_d, other=0.0) * LOG2E
        i_row = i_b * directions + i_k
        i_walked = i_row * chunks + gl.where(backwards > 0, chunks - 1 - i_j, i_j)
        b_h = gl.load(p_start + i_walked * dim + o_d, mask=in_d & (has_start > 0), other=0.0)
        p_tile = p_kept + (i_row * (2 * gl.cdiv(length, T)) + start // 8) * dim + o_d
        p_row = p_low + i_k * (rank + 2)
        # What another thread has written for the last direction may be added to.
        synchronize()
        for t0 in range(0, stop - start, T):
            pixels = _positions(p_order + i_f * length, start, stop, t0, backwards, T, LINE)
            p_line = p_row + pixels * low_pixel + rank
            b_B = gl.convert_layout(gl.load(p_line).to(STATE), STEPS)
            b_C = gl.convert_layout(gl.load(p_line + 1).to(STATE) * LN2, STEPS)
            o_pixel = gl.convert_layout(pixels, STEPS)
            b_x = gl.load(p_x + (o_pixel * x_pixel)[:, None] + o_d[None, :], mask=in_d[None, :], other=0.0)
            p_y = p_out + (o_pixel * dim)[:, None] + o_d[None, :]
            b_y = gl.load(p_y, mask=(in_d & (i > 0))[None, :], other=0.0).to(STATE)
            gl.store(p_tile + t0 // 8 * dim, b_h, mask=in_d & (keeps > 0))

            b_raw = gl.zeros([T, BLOCK_D], STATE, layout=MMA)
            b_raw = _project(p_row, low_pixel, pixels, rank, t0, stop - start, weight, b_raw, RANK_SLABS, MMA)
            b_v = gl.convert_layout(b_raw, TILE) * LOG2E + b_bias[None, :]
            b_s = softplus2(b_v, ACCURATE)
            b_x = b_x.to(STATE)
            b_hs, _, b_middle, b_h = linear_scan(
                exp2(b_s * b_A[None, :]), b_s * b_x * b_B[:, None], b_h, TILE
            )
            gl.store(p_tile + (t0 // 8 + 1) * dim, b_middle, mask=in_d & (keeps > 0))
            b_y = b_x * b_D[None, :] + b_y
            b_y = b_hs * b_C[:, None] + b_y
            # Steps beyond the end repeat the last one, with the same state, and write the same number.
            gl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=in_d[None, :])


@jit(do_not_specialize=CHANGING)
def fused_chunk_state_kernel(
    p_x,
    p_low,
    p_W,
    p_A,
    p_bias,
    p_order,
    p_end,
    p_sum,
    length,
    dim,
    rank,
    first,
    count,
    families,
    pairs,
    chunk,
    chunks,
    x_pixel,
    x_image,
    weight_strides,
    low_pixel,
    low_image,
    ADJOINT: tl.constexpr,
    RANK_SLABS: tl.constexpr,
    VEC: tl.constexpr,
    T: tl.constexpr,
):
    """Scan one chunk from a state of zero; write the state at its end and the sum of its steps, in base 2.

    Both are (B, K, J, D), chunks in the order of the walk. With ADJOINT the walk is that of the backward,
    from the last step to the first: `p_x` is the gradient of the output, and `p_end` takes what leaves the
    chunk.
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    LOW_TYPE: tl.constexpr = p_low.dtype.element_ty
    ACCURATE: tl.constexpr = gl.float32 == LOW_TYPE
    BLOCK_D: tl.constexpr = 32 * VEC
    TILE: tl.constexpr = gl.BlockedLayout([T, VEC], [1, 32], [1, 1], [1, 0])
    LINE: tl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    STEPS: tl.constexpr = gl.SliceLayout(1, TILE)

    dim = dim // VEC * VEC
    x_pixel = x_pixel // VEC * VEC
    blocks = gl.cdiv(dim, BLOCK_D)
    i_task = gl.program_id(0)
    i_d = i_task % blocks
    i_j = i_task // blocks % chunks
    i_b = (i_task // blocks // chunks).to(gl.int64)
    o_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, TILE))
    in_d = o_d < dim
    start = i_j * chunk
    stop = gl.minimum(start + chunk, length)
    tiles = gl.cdiv(stop - start, T)
    p_x += i_b * (x_image // VEC * VEC)
    p_low += i_b * low_image

    for i in range(first, first + count):
        i_k, i_f, backwards = _direction(i, families, pairs)
        weight = _share_weight(
            p_W + i_k * weight_strides[0], weight_strides, dim, rank, i_d, LOW_TYPE, RANK_SLABS, BLOCK_D, TILE
        )
        b_A = gl.load(p_A + i_k * dim + o_d, mask=in_d, other=0.0)
        b_bias = gl.load(p_bias + i_k * dim + o_d, mask=in_d, other=0.0) * LOG2E
        b_h = gl.zeros([BLOCK_D], STATE, layout=gl.SliceLayout(0, TILE))
        b_sum = gl.zeros([BLOCK_D], STATE, layout=gl.SliceLayout(0, TILE))
        p_row = p_low + i_k * (rank + 2)
        for i_t in range(0, tiles):
            t0 = (tiles - 1 - i_t if ADJOINT else i_t) * T
            pixels = _positions(p_order + i_f * length, start, stop, t0, backwards, T, LINE)
            p_line = p_row + pixels * low_pixel + rank
            if ADJOINT:
                # A step beyond the end must not bring in the gradient of the one that it repeats.
                b_C = gl.load(p_line + 1).to(STATE) * LN2
                b_C = gl.where(t0 + gl.arange(0, T, layout=LINE) < stop - start, b_C, 0.0)
                b_in = gl.convert_layout(b_C, STEPS)
            else:
                b_in = gl.convert_layout(gl.load(p_line).to(STATE), STEPS)
            o_pixel = gl.convert_layout(pixels, STEPS)
            b_x = gl.load(p_x + (o_pixel * x_pixel)[:, None] + o_d[None, :], mask=in_d[None, :], other=0.0)
            b_raw = gl.zeros([T, BLOCK_D], STATE, layout=MMA)
            b_raw = _project(p_row, low_pixel, pixels, rank, t0, stop - start, weight, b_raw, RANK_SLABS, MMA)
            b_v = gl.convert_layout(b_raw, TILE) * LOG2E + b_bias[None, :]
            b_s = softplus2(b_v, ACCURATE)
            b_decay = exp2(b_s * b_A[None, :])
            b_x = b_x.to(STATE) * b_in[:, None]
            if ADJOINT:
                _, _, b_h = adjoint_scan(b_decay, b_x, b_h, TILE)
            else:
                _, _, _, b_h = linear_scan(b_decay, b_s * b_x, b_h, TILE)
                b_sum += gl.sum(b_s, 0)
        i_walked = gl.where(backwards > 0, chunks - 1 - i_j, i_j)
        i_walked = chunks - 1 - i_walked if ADJOINT else i_walked
        o_end = ((i_b * families * pairs + i_k) * chunks + i_walked) * dim + o_d
        gl.store(p_end + o_end, b_h, mask=in_d)
        if not ADJOINT:
            gl.store(p_sum + o_end, b_sum, mask=in_d)


@jit(do_not_specialize=CHANGING)
def fused_state_passing_kernel(p_states, p_sum, p_A, directions, dim, chunks, adjoint, T: tl.constexpr):
    """Replace the state at the end of each chunk by the state that enters it, in the order of the walk.

    The decay over a chunk is 2^(A times the sum of its steps). A program takes 32 channels of one image and
    direction, T chunks at a time. With `adjoint` the sums are read from the last chunk on.
    """
    TILE: tl.constexpr = gl.BlockedLayout([T, 1], [1, 32], [1, 1], [1, 0])
    STATE: tl.constexpr = p_A.dtype.element_ty
    blocks = gl.cdiv(dim, 32)
    i_task = gl.program_id(0)
    i_row = (i_task // blocks).to(gl.int64)
    o_d = i_task % blocks * 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, TILE))
    in_d = o_d < dim
    o_t = gl.arange(0, T, layout=gl.SliceLayout(1, TILE))
    b_A = gl.load(p_A + (i_row % directions) * dim + o_d, mask=in_d, other=0.0)
    p_states += i_row * chunks * dim
    p_sum += i_row * chunks * dim
    b_h = gl.zeros([32], STATE, layout=gl.SliceLayout(0, TILE))
    for j0 in range(0, chunks, T):
        o_j = j0 + o_t
        inside = (o_j < chunks)[:, None] & in_d[None, :]
        o_sum = gl.where(adjoint > 0, chunks - 1 - o_j, o_j)
        b_s = gl.load(p_sum + (o_sum * dim)[:, None] + o_d[None, :], mask=inside, other=0.0)
        p_end = p_states + (o_j * dim)[:, None] + o_d[None, :]
        b_end = gl.load(p_end, mask=inside, other=0.0)
        _, b_start, _, b_h = linear_scan(exp2(b_s * b_A[None, :]), b_end, b_h, TILE)
        gl.store(p_end, b_start, mask=inside)


@jit(do_not_specialize=CHANGING)
def fused_cross_scan_bwd_kernel(
    p_x,
    p_low,
    p_W,
    p_A,
    p_D,
    p_bias,
    p_order,
    p_kept,
    p_flow,
    p_grad_out,
    p_grad_x,
    p_grad_low,
    p_grad_W,
    p_grad_parameters,
    length,
    dim,
    rank,
    first,
    count,
    families,
    pairs,
    chunk,
    chunks,
    batch,
    images,
    x_pixel,
    x_image,
    weight_strides,
    low_pixel,
    low_image,
    grad_pixel,
    grad_image,
    has_start,
    RANK_SLABS: tl.constexpr,
    SLABS: tl.constexpr,
    SLAB: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the gradients of one chunk of `images` images in `count` directions from the `first` on.

    The states that enter each tile are read from `p_kept` and the rest is computed again, tile by tile from
    the last one to the first; `p_flow`, (B, K, J, D) in the order of the backward, is what the adjoint
    brings into the chunk. `p_grad_x` is (B, L, D) of the state's dtype and added to by all but direction 0.
    What others than this program contribute to is left to the caller's sum: `p_grad_low`, (channel blocks,
    B, L, K (R + 2)),
    `p_grad_W`, (programs of the images and chunks, K, D, R), and `p_grad_parameters`, (the same, K, 3, D)
    for A, D and the bias. The ranks are processed in SLABS slabs of SLAB (8 or 16) ranks.
    """
    STATE: tl.constexpr = p_A.dtype.element_ty
    LOW_TYPE: tl.constexpr = p_low.dtype.element_ty
    ACCURATE: tl.constexpr = gl.float32 == LOW_TYPE
    BLOCK_D: tl.constexpr = 32 * VEC
    T: tl.constexpr = 16
    HALF: tl.constexpr = 8
    TILE: tl.constexpr = gl.BlockedLayout([HALF, VEC], [1, 32], [1, 1], [1, 0])
    ROWS: tl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [1, 1], [1, 0])
    LINE: tl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    K_WIDTH: tl.constexpr = 4 // (LOW_TYPE.primitive_bitwidth // 8)
    LEFT: tl.constexpr = gl.DotOperandLayout(0, MMA, K_WIDTH)
    RIGHT: tl.constexpr = gl.DotOperandLayout(1, MMA, K_WIDTH)
    COPY_X: tl.constexpr = copy_layout(p_x.dtype.element_ty, VEC, WIDE)
    COPY_GRAD: tl.constexpr = copy_layout(p_grad_out.dtype.element_ty, VEC, WIDE)
    UNIT: tl.constexpr = 8 if WIDE else VEC

    dim = dim // UNIT * UNIT
    x_pixel = x_pixel // UNIT * UNIT
    grad_pixel = grad_pixel // UNIT * UNIT
    blocks = gl.cdiv(dim, BLOCK_D)
    i_task = gl.program_id(0)
    i_d = i_task % blocks
    i_part = (i_task // blocks).to(gl.int64)
    i_j = i_task // blocks % chunks
    first_image = i_task // blocks // chunks * images
    directions = families * pairs
    o_d = i_d * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, TILE))
    in_d = o_d < dim
    o_t = gl.arange(0, HALF, layout=gl.SliceLayout(1, TILE))
    o_low_r = gl.arange(0, SLAB, layout=gl.SliceLayout(0, RIGHT))
    o_out_r = gl.arange(0, SLAB, layout=gl.SliceLayout(0, MMA))
    o_out_t = gl.arange(0, T, layout=gl.SliceLayout(1, MMA))
    o_sum_t = gl.arange(0, T, layout=gl.SliceLayout(1, ROWS))
    width = directions * (rank + 2)
    start = i_j * chunk
    steps = gl.minimum(start + chunk, length) - start
    tiles = gl.cdiv(steps, T)

    for i in range(first, first + count):
        i_k, i_f, backwards = _direction(i, families, pairs)
        weight = _share_weight(
            p_W + i_k * weight_strides[0],
            weight_strides,
            dim,
            rank,
            i_d,
            LOW_TYPE,
            RANK_SLABS,
            BLOCK_D,
            TILE,
        )
        b_A = gl.load(p_A + i_k * dim + o_d, mask=in_d, other=0.0)
        b_D = gl.load(p_D + i_k * dim + o_d, mask=in_d, other=0.0)
        b_bias = gl.load(p_bias + i_k * dim + o_d, mask=in_d, other=0.0) * LOG2E
        b_grad_A = gl.zeros([BLOCK_D], STATE, layout=gl.SliceLayout(0, TILE))
        b_grad_D = gl.zeros([BLOCK_D], STATE, layout=gl.SliceLayout(0, TILE))
        b_grad_bias = gl.zeros([BLOCK_D], STATE, layout=gl.SliceLayout(0, TILE))
        # The gradient of the weight: one slab in registers, more than one in shared memory.
        b_grad_W = gl.zeros([BLOCK_D, SLAB], STATE, layout=MMA)
        if SLABS > 1:
            grad_W = shared_tile(STATE, BLOCK_D, SLAB, SLABS)
            for i_slab in tl.static_range(SLABS):
                grad_W.index(i_slab).store(b_grad_W)
        # What another thread has written for the last direction may be added to.
        synchronize()
        for i_image in range(0, gl.minimum(images, batch - first_image)):
            i_b = first_image.to(gl.int64) + i_image
            i_row = i_b * directions + i_k
            i_walked = i_row * chunks + gl.where(backwards > 0, i_j, chunks - 1 - i_j)
            b_flow = gl.load(p_flow + i_walked * dim + o_d, mask=in_d & (has_start > 0), other=0.0)
            p_tile = p_kept + (i_row * (2 * gl.cdiv(length, T)) + start // HALF) * dim + o_d
            p_map = p_x + i_b * (x_image // UNIT * UNIT)
            p_row = p_low + i_b * low_image + i_k * (rank + 2)
            p_grad = p_grad_out + i_b * (grad_image // UNIT * UNIT)
            p_by_x = p_grad_x + i_b * length * dim
            p_by_low = p_grad_low + (i_d * batch + i_b) * length * width + i_k * (rank + 2)
            for i_t in range(0, tiles):
                t0 = (tiles - 1 - i_t) * T
                pixels = _positions(p_order + i_f * length, start, start + steps, t0, backwards, T, LINE)
                p_line = p_row + pixels * low_pixel + rank
                # One column each: a thread reads those of its steps by one wide load from shared memory.
                lines_B = shared_line(gl.load(p_line).to(STATE))
                lines_C = shared_line(gl.load(p_line + 1).to(STATE) * LN2)
                lines_pixel = shared_line(pixels)
                x = share(_load_map(p_map, pixels, x_pixel, t0, steps, i_d, dim, COPY_X, BLOCK_D), T, BLOCK_D)
                grad = share(
                    _load_map(p_grad, pixels, grad_pixel, t0, steps, i_d, dim, COPY_GRAD, BLOCK_D), T, BLOCK_D
                )
                b_raw = gl.zeros([T, BLOCK_D], STATE, layout=MMA)
                b_raw = _project(p_row, low_pixel, pixels, rank, t0, steps, weight, b_raw, RANK_SLABS, MMA)
                raw = share(b_raw, T, BLOCK_D)
                by_v = shared_tile(LOW_TYPE, T, BLOCK_D)
                by_B = shared_tile(STATE, T, 32)
                by_C = shared_tile(STATE, T, 32)
                x_halves, grad_halves, raw_halves = halves(x), halves(grad), halves(raw)
                by_v_halves, by_B_halves, by_C_halves = halves(by_v), halves(by_B), halves(by_C)
                # The second half first; a loop, so that half a tile at a time is in registers.
                for i_half in range(0, 2):
                    half = 1 - i_half
                    b_B = lines_B.index(half).load(gl.SliceLayout(1, TILE))
                    b_C = lines_C.index(half).load(gl.SliceLayout(1, TILE))
                    b_x = x_halves.index(half).load(TILE).to(STATE)
                    b_h = gl.load(p_tile + (t0 // HALF + half) * dim, mask=in_d, other=0.0)
                    b_v = raw_halves.index(half).load(TILE) * LOG2E + b_bias[None, :]
                    b_s = softplus2(b_v, ACCURATE)
                    b_slope = exp2(b_v - b_s)
                    b_decay = exp2(b_s * b_A[None, :])
                    b_sx = b_s * b_x
                    b_hs, b_before, _, _ = linear_scan(b_decay, b_sx * b_B[:, None], b_h, TILE)
                    b_g = grad_halves.index(half).load(TILE).to(STATE)
                    by_C_halves.index(half).store(pair_sums(b_g * b_hs, VEC))
                    b_grad_D += gl.sum(b_g * b_x, 0)
                    b_adjoint, b_flows, b_flow = adjoint_scan(b_decay, b_g * b_C[:, None], b_flow, TILE)
                    by_B_halves.index(half).store(pair_sums(b_adjoint * b_sx, VEC))
                    b_by_input = b_adjoint * b_B[:, None]
                    b_through = b_flows * b_before
                    b_grad_A += gl.sum(b_through * b_s, 0)

                    o_pixel = lines_pixel.index(half).load(gl.SliceLayout(1, TILE))
                    p_y = p_by_x + (o_pixel * dim)[:, None] + o_d[None, :]
                    b_y = gl.load(p_y, mask=(in_d & (i > 0))[None, :], other=0.0)
                    b_y = b_g * b_D[None, :] + b_y
                    in_td = (t0 + half * HALF + o_t < steps)[:, None] & in_d[None, :]
                    gl.store(p_y, b_by_input * b_s + b_y, mask=in_td)

                    b_by_v = b_through * (b_A * LN2)[None, :]
                    b_by_v = (b_by_input * b_x + b_by_v) * b_slope
                    b_grad_bias += gl.sum(b_by_v, 0)
                    by_v_halves.index(half).store(b_by_v.to(LOW_TYPE))

                o_sum = gl.convert_layout(pixels, gl.SliceLayout(1, ROWS)) * width + rank
                in_sum = t0 + o_sum_t < steps
                gl.store(p_by_low + o_sum, gl.sum(by_B.load(ROWS), 1), mask=in_sum)
                gl.store(p_by_low + o_sum + 1, gl.sum(by_C.load(ROWS), 1) * LN2, mask=in_sum)
                o_out = gl.convert_layout(pixels, gl.SliceLayout(1, MMA)) * width
                o_low = gl.convert_layout(pixels, gl.SliceLayout(1, RIGHT)) * low_pixel
                for r0 in tl.static_range(0, SLABS * SLAB, SLAB):
                    b_W = weight.index(r0 // 16).slice(0, SLAB).permute([1, 0]).load(RIGHT)
                    b_by_low = mma(by_v.load(LEFT), b_W, gl.zeros([T, SLAB], STATE, layout=MMA))
                    in_out = (t0 + o_out_t < steps)[:, None] & (r0 + o_out_r < rank)[None, :]
                    gl.store(
                        p_by_low + o_out[:, None] + (r0 + o_out_r)[None, :], b_by_low * LOG2E, mask=in_out
                    )
                    b_low = gl.load(
                        p_row + o_low[:, None] + (r0 + o_low_r)[None, :],
                        mask=(r0 + o_low_r < rank)[None, :],
                        other=0.0,
                    )
                    if SLABS > 1:
                        b_grad_W = grad_W.index(r0 // SLAB).load(MMA)
                    b_grad_W = mma(by_v.permute([1, 0]).load(LEFT), b_low, b_grad_W)
                    if SLABS > 1:
                        grad_W.index(r0 // SLAB).store(b_grad_W)
        o_part = i_part * directions + i_k
        o_grad_d = prevent_hoisting(i_d) * BLOCK_D + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(1, MMA))
        p_by_W = p_grad_W + (o_part * dim + o_grad_d)[:, None] * rank
        for i_slab in tl.static_range(SLABS):
            o_r = i_slab * SLAB + o_out_r
            if SLABS > 1:
                b_grad_W = grad_W.index(i_slab).load(MMA)
            in_grad = (o_r < rank)[None, :] & (o_grad_d < dim)[:, None]
            gl.store(p_by_W + o_r[None, :], b_grad_W * LOG2E, mask=in_grad)
        p_by = p_grad_parameters + o_part * 3 * dim + o_d
        gl.store(p_by, b_grad_A * LN2, mask=in_d)
        gl.store(p_by + dim, b_grad_D, mask=in_d)
        gl.store(p_by + 2 * dim, b_grad_bias * LOG2E, mask=in_d)
