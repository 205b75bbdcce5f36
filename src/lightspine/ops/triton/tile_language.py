"""Language layer of the fused kernels: Gluon when compiled, Triton's interpreter in tests.

The kernels process tiles of (steps, channels). Each thread holds all steps of its channels, so that the
recurrence runs in registers without shuffles. Triton's own layout selection puts the steps on different
threads (50 instructions per step in place of 26), therefore the kernels name their layouts, in Gluon. Gluon
has no interpreter: with TRITON_INTERPRET=1 the same sources run on `triton.language`, where layouts mean
nothing, and the few functions below that Triton cannot interpret (assembly, scans, shared memory) run on
NumPy.
"""

# Kernels are written in Triton's language: untyped, and not executed by Python.
# mypy: ignore-errors
# ruff: noqa: ARG001, ARG002, ARG004, D102, D103

import numpy as np
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)

if INTERPRETED:
    from triton.runtime.interpreter import TensorHandle

    def jit(function=None, **options):
        return triton.jit(function, **options)

    def device_function(function):
        return function

    def _wrap(data, dtype):
        data = np.ascontiguousarray(data)
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))

    class SharedTile:
        """A tile in memory that all threads of a program read; slices of it share its memory."""

        def __init__(self, data, dtype):
            self.data, self.dtype = data, dtype

        def slice(self, start, length):
            return SharedTile(self.data[start : start + length], self.dtype)

        def index(self, index):
            return SharedTile(self.data[int(index)], self.dtype)

        def permute(self, order):
            return SharedTile(self.data.transpose(order), self.dtype)

        def load(self, layout):
            return _wrap(self.data.copy(), self.dtype)

        def store(self, value):
            self.data[:] = value.handle.data

    class gl:  # noqa: N801 - stands for the module of this name
        """The part of Gluon that the kernels use, without layouts."""

        constexpr = tl.constexpr
        float32, float64, int32, int64 = tl.float32, tl.float64, tl.int32, tl.int64

        @staticmethod
        def BlockedLayout(*_):  # noqa: N802
            return None

        SliceLayout = NVMMADistributedLayout = DotOperandLayout = BlockedLayout

        @staticmethod
        def arange(start, end, layout=None):
            return tl.arange(start, end)

        @staticmethod
        def zeros(shape, dtype, layout=None):
            return tl.zeros(shape, dtype)

        @staticmethod
        def full(shape, value, dtype, layout=None):
            return (tl.zeros(shape, tl.float32) + value).to(dtype)

        @staticmethod
        def convert_layout(value, layout):
            return value

        @staticmethod
        def program_id(axis):
            return tl.program_id(axis)

        @staticmethod
        def load(pointer, mask=None, other=None):
            return tl.load(pointer, mask=mask, other=other)

        @staticmethod
        def store(pointer, value, mask=None):
            tl.store(pointer, value, mask=mask)

        @staticmethod
        def where(condition, x, y):
            return tl.where(condition, x, y)

        @staticmethod
        def minimum(x, y):
            return tl.minimum(x, y)

        @staticmethod
        def maximum(x, y):
            return tl.maximum(x, y)

        @staticmethod
        def abs(x):
            return tl.abs(x)

        @staticmethod
        def sum(x, axis):
            return tl.sum(x, axis)

        @staticmethod
        def cdiv(x, y):
            return (x + y - 1) // y

        @staticmethod
        def permute(x, order):
            return tl.permute(x, order)

    def exp2(x):
        return tl.exp2(x)

    def log2(x):
        return tl.log2(x)

    def reciprocal(x):
        return 1.0 / x

    def linear_scan(a, b, h, TILE):
        dtype = b.dtype
        a, b, h = a.handle.data, b.handle.data, h.handle.data
        after, before = np.empty_like(b), np.empty_like(b)
        for t in range(len(b)):
            before[t] = h
            h = after[t] = a[t] * h + b[t]
        middle = after[len(b) // 2 - 1]
        return _wrap(after, dtype), _wrap(before, dtype), _wrap(middle, dtype), _wrap(h, dtype)

    def adjoint_scan(a, b, h, TILE):
        dtype = b.dtype
        a, b, h = a.handle.data, b.handle.data, h.handle.data
        adjoint, flow = np.empty_like(b), np.empty_like(b)
        for t in range(len(b))[::-1]:
            adjoint[t] = b[t] + h
            h = flow[t] = a[t] * adjoint[t]
        return _wrap(adjoint, dtype), _wrap(flow, dtype), _wrap(h, dtype)

    def pair_sums(x, VEC):
        data = x.handle.data
        return _wrap(data.reshape(len(data), 32, VEC).sum(2), x.dtype)

    def mma(x, y, acc):
        product = np.matmul(x.to(acc.dtype).handle.data, y.to(acc.dtype).handle.data)
        return _wrap(acc.handle.data + product.astype(acc.handle.data.dtype), acc.dtype)

    def share(x, ROWS, COLUMNS):
        return SharedTile(x.handle.data.copy(), x.dtype)

    def shared_line(x):
        return halves(SharedTile(x.handle.data.copy(), x.dtype))

    def halves(x):
        return SharedTile(x.data.reshape(2, -1, *x.data.shape[1:]), x.dtype)

    def copy_layout(dtype, VEC, WIDE):
        return None

    def shared_tile(dtype, ROWS, COLUMNS, COPIES=None):
        tile = tl.zeros([ROWS, COLUMNS], dtype).handle.data
        return SharedTile(tile.copy() if COPIES is None else np.repeat(tile[None], COPIES, 0), dtype)

    def state_layout(*_):
        return None

    step_layout = row_layout = partial_layout = state_layout

    def shared_rows(dtype, ROWS, COLUMNS):
        return shared_tile(dtype, ROWS, COLUMNS)

    def as_tile(rows):
        return rows

    def shared_partials(dtype, ROWS, STATES, WARPS):
        return shared_tile(dtype, STATES, WARPS, ROWS)

    def load_partials(partials, layout):
        return partials.permute((0, 2, 1)).load(layout)

    def warp_sums(x, WARPS):
        data = x.handle.data
        return _wrap(data.reshape(len(data), WARPS, -1).sum(2), x.dtype)

    def synchronize():
        pass

    def prevent_hoisting(x):
        return x

else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2

    # Triton 3.6 calls it thread_barrier.
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

    jit = gluon.jit
    device_function = gluon.jit

    @gluon.jit
    def exp2(x):
        """Return 2^x; for float32 with denormal numbers flushed to zero and a relative error of 2^-22."""
        if x.dtype == gl.float64:
            return gl.exp2(x)
        else:
            return gl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
            )

    @gluon.jit
    def log2(x):
        """Return the logarithm to base 2 of a normal number; float32: error 2^-22 between 0.5 and 2."""
        if x.dtype == gl.float64:
            return gl.log2(x)
        else:
            return gl.inline_asm_elementwise(
                "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
            )

    @gluon.jit
    def reciprocal(x):
        """Return 1 / x; for float32 with an error of one unit in the last place, 0 above 2^126."""
        if x.dtype == gl.float64:
            return 1.0 / x
        else:
            return gl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
            )

    @gluon.jit
    def _halves(x):
        """Return the first and the second half of the rows of a tile; nothing moves."""
        HALF: gl.constexpr = x.shape[0] // 2
        return gl.split(gl.permute(gl.reshape(x, [2, HALF, x.shape[1]]), [1, 2, 0]))

    @gluon.jit
    def _stack(x, y):
        """Return the rows of x, then those of y; the inverse of `_halves`."""
        ROWS: gl.constexpr = 2 * x.shape[0]
        return gl.reshape(gl.permute(gl.join(x, y), [2, 0, 1]), [ROWS, x.shape[1]])

    @gluon.jit
    def _scan_rows(a, b, h, ROW: gl.constexpr):
        """Scan the rows of a tile from a state (1, channels); return after, before, and the last state."""
        if a.shape[0] == 1:
            after = gl.convert_layout(a, ROW) * h + gl.convert_layout(b, ROW)
            return after, h, after
        else:
            a1, a2 = _halves(a)
            b1, b2 = _halves(b)
            after1, before1, h = _scan_rows(a1, b1, h, ROW)
            after2, before2, h = _scan_rows(a2, b2, h, ROW)
            return _stack(after1, after2), _stack(before1, before2), h

    @gluon.jit
    def linear_scan(a, b, h, TILE: gl.constexpr):
        """Return h_t = a_t h_(t-1) + b_t for all rows t of a tile, h_(t-1), the middle and the last h_t.

        `h` stands before the first row. All rows of a channel lie in one thread (layout TILE), so that taking
        rows apart and stacking them moves nothing: one multiply-add per element. `tl.associative_scan` costs
        two more, and 10 shuffles where it runs in reverse.
        """
        ROW: gl.constexpr = gl.BlockedLayout([1, TILE.size_per_thread[1]], [1, 32], [1, 1], [1, 0])
        h = gl.convert_layout(gl.expand_dims(h, 0), ROW)
        a1, a2 = _halves(a)
        b1, b2 = _halves(b)
        after1, before1, middle = _scan_rows(a1, b1, h, ROW)
        after2, before2, h = _scan_rows(a2, b2, middle, ROW)
        after = gl.convert_layout(_stack(after1, after2), TILE)
        before = gl.convert_layout(_stack(before1, before2), TILE)
        middle = gl.convert_layout(gl.reshape(middle, [middle.shape[1]]), gl.SliceLayout(0, TILE))
        h = gl.convert_layout(gl.reshape(h, [h.shape[1]]), gl.SliceLayout(0, TILE))
        return after, before, middle, h

    @gluon.jit
    def _adjoint_rows(a, b, h, ROW: gl.constexpr):
        """Scan the rows of a tile from the last to the first; return adjoint, flow, and the last flow."""
        if a.shape[0] == 1:
            adjoint = gl.convert_layout(b, ROW) + h
            flow = gl.convert_layout(a, ROW) * adjoint
            return adjoint, flow, flow
        else:
            a1, a2 = _halves(a)
            b1, b2 = _halves(b)
            adjoint2, flow2, h = _adjoint_rows(a2, b2, h, ROW)
            adjoint1, flow1, h = _adjoint_rows(a1, b1, h, ROW)
            return _stack(adjoint1, adjoint2), _stack(flow1, flow2), h

    @gluon.jit
    def adjoint_scan(a, b, h, TILE: gl.constexpr):
        """Return g_t = b_t + f_(t+1) for all rows t of a tile, f_t = a_t g_t, and the first f_t.

        `h` stands behind the last row. This is the backward of `linear_scan`: g is the adjoint of the state,
        f what flows to the step before.
        """
        ROW: gl.constexpr = gl.BlockedLayout([1, TILE.size_per_thread[1]], [1, 32], [1, 1], [1, 0])
        h = gl.convert_layout(gl.expand_dims(h, 0), ROW)
        adjoint, flow, h = _adjoint_rows(a, b, h, ROW)
        h = gl.convert_layout(gl.reshape(h, [h.shape[1]]), gl.SliceLayout(0, TILE))
        return gl.convert_layout(adjoint, TILE), gl.convert_layout(flow, TILE), h

    @gluon.jit
    def pair_sums(x, VEC: gl.constexpr):
        """Return the sums over the VEC channels of each thread, (rows, 32)."""
        ROWS: gl.constexpr = x.shape[0]
        LANES: gl.constexpr = gl.BlockedLayout([ROWS, 1], [1, 32], [1, 1], [1, 0])
        if VEC > 1:
            x = gl.sum(gl.reshape(x, [ROWS, 32, VEC]), 2)
        return gl.convert_layout(x, LANES)

    @gluon.jit
    def mma(x, y, acc):
        """Return x @ y + acc on the tensor cores; float32 operands are split in two tf32 numbers each."""
        if x.dtype == gl.float32:
            x_high, y_high = _tf32(x), _tf32(y)
            acc = mma_v2(x - x_high, y_high, acc, input_precision="tf32")
            acc = mma_v2(x_high, y - y_high, acc, input_precision="tf32")
            acc = mma_v2(x_high, y_high, acc, input_precision="tf32")
        else:
            acc = mma_v2(x, y, acc)
        return acc

    @gluon.jit
    def _tf32(x):
        return (x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)

    @gluon.constexpr_function
    def _swizzled(dtype):
        # 16 bytes stay together; eight rows of a product's result fall into different banks.
        return gl.SwizzledSharedLayout(128 // dtype.primitive_bitwidth, 1, 8, [1, 0])

    @gluon.jit
    def share(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
        """Return a tile in shared memory; `.load(layout)` reads it, `.slice(start, length)` is part of it."""
        return gl.allocate_shared_memory(x.dtype, [ROWS, COLUMNS], _swizzled(x.dtype), x)

    @gluon.jit
    def shared_line(x):
        """Return a vector in shared memory, in two halves."""
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        line = gl.allocate_shared_memory(x.dtype, [x.shape[0]], layout, x)
        return line._reinterpret(x.dtype, [2, x.shape[0] // 2], layout)

    @gluon.jit
    def halves(x):
        """Return a shared tile as its upper and its lower half, for `.index`."""
        return x._reinterpret(x.dtype, [2, x.shape[0] // 2, x.shape[1]], x.layout)

    @gluon.constexpr_function
    def copy_layout(dtype, VEC, WIDE):
        """Return the layout in which a tile of 32 VEC channels is read: 16 bytes a thread if WIDE."""
        size = 128 // dtype.primitive_bitwidth if WIDE else VEC
        lanes = min(32, 32 * VEC // size)
        return gl.BlockedLayout([1, size], [32 // lanes, lanes], [1, 1], [1, 0])

    @gluon.jit
    def shared_tile(
        DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, COPIES: gl.constexpr = None
    ):
        """Return a tile of shared memory that nothing has been written to; `.store(x)` does.

        COPIES such tiles if given, for `.index`.
        """
        SHAPE: gl.constexpr = [ROWS, COLUMNS] if COPIES is None else [COPIES, ROWS, COLUMNS]
        return gl.allocate_shared_memory(DTYPE, SHAPE, _swizzled(DTYPE))

    @gluon.constexpr_function
    def state_layout(STATES, CHANNELS, WARPS):
        """Return the layout of (states, channels): at most 4 states of some channels in a thread.

        More than 64 states are 16 threads wide. The warps own different channels.
        """
        in_thread = max(min(4, STATES), STATES // 16)
        lanes = STATES // in_thread
        channels = CHANNELS // (32 // lanes * WARPS)
        return gl.BlockedLayout([in_thread, channels], [lanes, 32 // lanes], [1, WARPS], [1, 0])

    @gluon.constexpr_function
    def step_layout(CHANNELS, WARPS):
        """Return the layout of (steps, channels); a warp owns the channels that it owns in `state_layout`."""
        size = min(4, CHANNELS // WARPS)
        lanes = min(32, CHANNELS // WARPS // size)
        return gl.BlockedLayout([1, size], [32 // lanes, lanes], [1, WARPS], [1, 0])

    @gluon.constexpr_function
    def row_layout(COLUMNS, WARPS):
        """Return the layout in which (steps, states) are read."""
        size = min(4, COLUMNS)
        lanes = min(32, COLUMNS // size)
        return gl.BlockedLayout([1, size], [32 // lanes, lanes], [WARPS, 1], [1, 0])

    @gluon.constexpr_function
    def partial_layout(STATES, WARPS):
        """Return the layout of (steps, warps, states) whose sum over the warps needs no shuffle."""
        lanes = min(32, STATES)
        return gl.BlockedLayout([1, WARPS, 1], [32 // lanes, 1, lanes], [WARPS, 1, 1], [2, 1, 0])

    @gluon.constexpr_function
    def _plain(order):
        return gl.SwizzledSharedLayout(1, 1, 1, order)

    @gluon.jit
    def shared_rows(DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
        """Return shared memory of which `.index(row)` is a vector; `as_tile` makes it a tile."""
        return gl.allocate_shared_memory(DTYPE, [ROWS, COLUMNS], _plain([0]))

    @gluon.jit
    def as_tile(rows):
        """Return `shared_rows` as one tile (rows, columns)."""
        return rows._reinterpret(rows.dtype, rows.shape, _plain([1, 0]))

    @gluon.jit
    def shared_partials(DTYPE: gl.constexpr, ROWS: gl.constexpr, STATES: gl.constexpr, WARPS: gl.constexpr):
        """Return shared memory for ROWS tiles of `warp_sums`."""
        return gl.allocate_shared_memory(DTYPE, [ROWS, STATES, WARPS], _plain([0, 1]))

    @gluon.jit
    def load_partials(partials, LAYOUT: gl.constexpr):
        """Return the rows of `shared_partials` as (rows, warps, states)."""
        SHAPE: gl.constexpr = [partials.shape[0], partials.shape[2], partials.shape[1]]
        return partials._reinterpret(partials.dtype, SHAPE, _plain([2, 1, 0])).load(LAYOUT)

    @gluon.jit
    def warp_sums(x, WARPS: gl.constexpr):
        """Return the sums over the channels of each warp of a tile in `state_layout`, (states, WARPS)."""
        return gl.sum(gl.reshape(x, [x.shape[0], WARPS, x.shape[1] // WARPS]), 2)

    @gluon.jit
    def prevent_hoisting(x):
        """Optimization barrier: an integer unchanged; what depends on it is not hoisted out of a loop."""
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
        )

    @gluon.jit
    def synchronize():
        """Wait for all threads of the program, and let them see what the others have stored."""
        barrier()
