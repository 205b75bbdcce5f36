"""Compiled CPU kernels of the selective scan, forward and backward.

A kernel processes one register of channels at a time, 16 float32 or 8 float64, over the whole sequence. It
receives all tensors in one table of integers: sizes, then addresses and strides. Only the channels have to be
contiguous, so tokens, feature maps and slices of a projection are read in place. `order` lists the position
that each scan step visits, so a direction needs no copy. Where positions instead of channels are contiguous,
as in the sequences (B, D, L) of mamba_ssm, a kernel transposes blocks of positions and channels into scratch
memory, and its results back.

The backward recomputes states and decays chunk by chunk into scratch memory of a fixed size, then goes
through the chunk in reverse with the gradient of the state. The states at the starts of the chunks were saved
by the forward; otherwise the sequence is scanned once more to find them.

Names: b batch, k group, c first channel of the register, t scan step, i step within the chunk, p position, n
state. `at_...` is the offset of the register's channels at position 0.
"""

# numba gives an intrinsic its typing context and reads the names of its arguments.
# ruff: noqa: ARG001

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from lightspine.ops.cpu.cache import kernel
from lightspine.ops.cpu.config import TRANSPOSED_POSITIONS, VECTORS_PER_POSITION
from lightspine.ops.cpu.openmp import run_on_openmp
from lightspine.ops.cpu.simd import (
    VECTOR_BYTES,
    broadcast,
    lane_sums,
    load,
    load_broadcast,
    store,
    transpose_tile,
)
from lightspine.ops.cpu.vector_math import LOG2_E, exp, exp2, sigmoid, softplus, softplus_and_slope

# Positions that `_project_dt` computes together.
_POSITIONS_AT_ONCE = 4


class Rows(NamedTuple):
    """A tensor (B, L, K, X) inside a kernel: its memory and its strides in elements.

    Attributes:
        memory: flat array without bounds.
        batch: stride of B.
        position: stride of L.
        group: stride of K; 0 where all groups share the memory.
        last: stride of X: of the states of B and C; 1 for channels, or their distance where positions are
            contiguous.
    """

    memory: Any
    batch: int
    position: int
    group: int
    last: int


class Operands(NamedTuple):
    """Inputs of both kernels.

    Attributes:
        batch: images or sequences B.
        length: positions L.
        groups: groups K.
        dim: channels D of a group.
        states: states N.
        slices: slices that the channels of an image are cut into.
        chunk: positions of a chunk.
        softplus: whether softplus is applied to dt.
        rank: R, or 0 where delta has all channels.
        gated: whether there is a gate.
        x: input, (B, L, K, D).
        delta: dt before bias and softplus, (B, L, K, D), or what `dt_weight` projects to it, (B, L, K, R).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        z: gate, (B, L, K, D).
        A: state matrices, contiguous (K, N, D).
        D: skip connections, contiguous (K, D).
        delta_bias: added to delta, contiguous (K, D).
        dt_weight: projects R values to the dt of all channels, contiguous (K, R, D).
    """

    batch: int
    length: int
    groups: int
    dim: int
    states: int
    slices: int
    chunk: int
    softplus: bool
    rank: int
    gated: bool
    x: Rows
    delta: Rows
    B: Rows
    C: Rows
    z: Rows
    A: Any
    D: Any
    delta_bias: Any
    dt_weight: Any


# Entries of the table for `Operands`: nine numbers, five `Rows`, four addresses.
OPERANDS = 9 + 5 * 5 + 4


class _Column(NamedTuple):
    """One register of channels of an operand along the sequence: `memory[at + position * step]` and on.

    Attributes:
        memory: of the operand, or scratch memory with the positions of a part in scan order.
        at: first channel at position 0.
        step: distance of positions.
    """

    memory: Any
    at: int
    step: int


@intrinsic
def memory_at(typingctx: Any, example: types.Array, address: types.Integer) -> Any:
    """Return the memory at an address as a flat array of the example's dtype, of unknown length."""

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        array = context.make_array(sig.return_type)(context, builder)
        size = context.get_constant(
            types.intp, context.get_abi_sizeof(context.get_data_type(sig.return_type.dtype))
        )
        populate_array(
            array,
            data=builder.inttoptr(args[1], array.data.type),
            shape=[context.get_constant(types.intp, 0)],
            strides=[size],
            itemsize=size,
            meminfo=ir.Constant(array.meminfo.type, None),
        )
        return array._getvalue()

    return example(example, types.intp), codegen


@njit(forceinline=True)
def read_rows(table: Any, at: int, example: Any) -> Rows:
    """Read the `Rows` in the five table entries from `at` on."""
    return Rows(memory_at(example, table[at]), table[at + 1], table[at + 2], table[at + 3], table[at + 4])


@njit(forceinline=True)
def read_operands(table: Any, x: Any, delta: Any, state: Any, z: Any) -> Operands:
    """Read the `Operands` at the start of a table, given examples of the dtypes."""
    return Operands(
        table[0],
        table[1],
        table[2],
        table[3],
        table[4],
        table[5],
        table[6],
        table[7] != 0,
        table[8],
        table[29] != 0,
        read_rows(table, 9, x),
        read_rows(table, 14, delta),
        read_rows(table, 19, state),
        read_rows(table, 24, state),
        read_rows(table, 29, z),
        memory_at(state, table[34]),
        memory_at(state, table[35]),
        memory_at(state, table[36]),
        memory_at(state, table[37]),
    )


@kernel
def forward_tasks(first: int, last: int, table: Any, types: tuple[Any, ...], order: Any) -> None:
    """Scan the tasks from `first` to before `last`; a task is one image and one slice of its channels.

    Args:
        first: first task.
        last: task after the last one.
        table: `Operands`; `Rows` of the output, with a group stride of 0 where the groups are summed; the
            address of the last state, (B, K, N, D); the address of the saved states, those at the start of
            each chunk but the first, (B, K, chunks - 1, N, D), or 0 to save none.
        types: examples of the dtypes of x, delta, state, z and the output.
        order: positions in scan order, (1, L) or (K, L).
    """
    inputs = read_operands(table, types[0], types[1], types[2], types[3])
    out = read_rows(table, OPERANDS, types[4])
    state, saved_states = memory_at(types[2], table[OPERANDS + 5]), memory_at(types[2], table[OPERANDS + 6])
    saves_states = table[OPERANDS + 6] != 0
    groups, dim, states = inputs.groups, inputs.dim, inputs.states
    lanes = VECTOR_BYTES // inputs.A.itemsize
    width = _slice_width(dim, inputs.slices, lanes)
    saved_chunks = (inputs.length - 1) // inputs.chunk
    transposed = _reads_sequences(inputs) or out.last != 1
    scratch = _scratch_size(transposed, lanes)
    x_scratch, delta_scratch = (
        np.empty(scratch, inputs.x.memory.dtype),
        np.empty(scratch, inputs.delta.memory.dtype),
    )
    z_scratch, out_scratch = np.empty(scratch, inputs.z.memory.dtype), np.empty(scratch, out.memory.dtype)
    # Two rows per state: A, scaled for powers of 2 in place of e, and the running state.
    rows = np.empty(2 * states * lanes, inputs.A.dtype)
    # The projected dt of a part of the sequence, and the columns of `dt_weight` that they need.
    dts = np.empty((inputs.chunk + _POSITIONS_AT_ONCE) * lanes if inputs.rank else 0, inputs.A.dtype)
    weight = np.empty(inputs.rank * lanes, inputs.A.dtype)
    for task in range(first, last):
        b, start = task // inputs.slices, task % inputs.slices * width
        for k in range(groups):
            positions = order[k if order.shape[0] > 1 else 0]
            for c in range(start, min(start + width, dim), lanes):
                count = dim - c
                x = _column(inputs.x, x_scratch, transposed, b, k, c, lanes)
                delta = _column(inputs.delta, delta_scratch, transposed, b, k, c, lanes)
                z = _column(inputs.z, z_scratch, transposed, b, k, c, lanes)
                y = _column(out, out_scratch, transposed, b, k, c, lanes)
                accumulate = k > 0 and out.group == 0
                for n in range(states):
                    row = load(inputs.A, (k * states + n) * dim + c, count) * LOG2_E
                    store(rows, 2 * n * lanes, row, lanes)
                    store(rows, (2 * n + 1) * lanes, broadcast(rows.dtype.type(0)), lanes)
                for r in range(inputs.rank):
                    at_weight = (k * inputs.rank + r) * dim + c
                    store(weight, r * lanes, load(inputs.dt_weight, at_weight, count), lanes)
                for t in range(0, inputs.length, inputs.chunk):
                    if t > 0 and saves_states:
                        saved = (b * groups + k) * saved_chunks + t // inputs.chunk - 1
                        _copy_states(rows, saved_states, saved * states * dim + c, states, dim, count)
                    end = min(t + inputs.chunk, inputs.length)
                    for first_step in range(t, end, TRANSPOSED_POSITIONS if transposed else inputs.chunk):
                        part = positions[first_step:end]
                        if transposed:
                            part = part[:TRANSPOSED_POSITIONS]
                            _gather_inputs(
                                inputs, x_scratch, delta_scratch, z_scratch, part, b, k, c, inputs.gated
                            )
                        if inputs.rank:
                            _project_dt(inputs, weight, dts, part, b, k, c)
                        _scan_part(inputs, rows, dts, part, b, k, c, x, delta, z, y, transposed, accumulate)
                        if transposed:
                            _scatter(out, out_scratch, part, b, k, c, count, lanes)
                _copy_states(rows, state, (b * groups + k) * states * dim + c, states, dim, count)


@njit(forceinline=True)
def _reads_sequences(inputs: Operands) -> bool:
    """Return whether an input has positions instead of channels innermost in memory."""
    return inputs.x.last != 1 or inputs.delta.last != 1 or (inputs.gated and inputs.z.last != 1)


@njit(forceinline=True)
def _scratch_size(transposed: bool, lanes: int) -> int:
    """Return the elements of the scratch memory of an operand: a part of the sequence, and two tiles."""
    return (TRANSPOSED_POSITIONS + 2 * lanes) * lanes if transposed else 0


@njit(forceinline=True)
def _column(rows: Rows, scratch: Any, transposed: bool, b: int, k: int, c: int, lanes: int) -> _Column:
    """Return the register of channels from `c` on: in its memory, or in scratch memory."""
    return _Column(
        scratch if transposed else rows.memory,
        0 if transposed else b * rows.batch + k * rows.group + c,
        lanes if transposed else rows.position,
    )


@njit(forceinline=True)
def _gather_inputs(
    inputs: Operands,
    x: Any,
    delta: Any,
    z: Any,
    part: Any,
    b: int,
    k: int,
    c: int,
    with_z: bool,
) -> None:
    """Copy a register of channels of x, delta and perhaps z at the positions `part` to scratch memory."""
    count, lanes = inputs.dim - c, VECTOR_BYTES // inputs.A.itemsize
    _gather(inputs.x, x, part, b, k, c, count, lanes)
    _gather(inputs.delta, delta, part, b, k, c, count, lanes)
    if with_z:
        _gather(inputs.z, z, part, b, k, c, count, lanes)


@njit
def _gather(rows: Rows, scratch: Any, part: Any, b: int, k: int, c: int, count: int, lanes: int) -> None:
    """Copy a register of channels at the positions `part` to scratch memory, (positions, lanes)."""
    at = b * rows.batch + k * rows.group + c * rows.last
    if rows.last == 1:
        for i in range(part.size):
            store(scratch, i * lanes, load(rows.memory, at + part[i] * rows.position, count), lanes)
        return
    tile = TRANSPOSED_POSITIONS * lanes
    for i in range(0, part.size, lanes):
        n = min(lanes, part.size - i)
        low, backward = min(part[i], part[i + n - 1]), part[i] > part[i + n - 1]
        if n == lanes and count >= lanes:
            first, step = (i + lanes - 1 if backward else i), (-lanes if backward else lanes)
            transpose_tile(rows.memory, at + low, rows.last, scratch, first * lanes, step)
        else:
            for r in range(lanes):
                # No element is read of a channel that does not exist.
                row = load(rows.memory, at + low + r * rows.last, n if r < count else 0)
                store(scratch, tile + r * lanes, row, lanes)
            transpose_tile(scratch, tile, lanes, scratch, tile + lanes * lanes, lanes)
            for j in range(n):
                to = i + (n - 1 - j if backward else j)
                store(scratch, to * lanes, load(scratch, tile + (lanes + j) * lanes, lanes), lanes)


@njit
def _scatter(rows: Rows, scratch: Any, part: Any, b: int, k: int, c: int, count: int, lanes: int) -> None:
    """Copy scratch memory (positions, lanes) to a register of channels at the positions `part`."""
    at = b * rows.batch + k * rows.group + c * rows.last
    if rows.last == 1:
        for i in range(part.size):
            store(rows.memory, at + part[i] * rows.position, load(scratch, i * lanes, lanes), count)
        return
    tile = TRANSPOSED_POSITIONS * lanes
    for i in range(0, part.size, lanes):
        n = min(lanes, part.size - i)
        low, backward = min(part[i], part[i + n - 1]), part[i] > part[i + n - 1]
        if n == lanes and count >= lanes:
            first, step = (i + lanes - 1 if backward else i), (-lanes if backward else lanes)
            transpose_tile(scratch, first * lanes, step, rows.memory, at + low, rows.last)
        else:
            for j in range(n):
                of = i + (n - 1 - j if backward else j)
                store(scratch, tile + j * lanes, load(scratch, of * lanes, lanes), lanes)
            transpose_tile(scratch, tile, lanes, scratch, tile + lanes * lanes, lanes)
            for r in range(min(count, lanes)):
                row = load(scratch, tile + (lanes + r) * lanes, lanes)
                store(rows.memory, at + low + r * rows.last, row, n)


@njit(forceinline=True)
def _project_dt(inputs: Operands, weight: Any, dts: Any, part: Any, b: int, k: int, c: int) -> None:
    """Project dt for a part of the sequence, four positions at a time: a row of the weight is loaded once."""
    delta, last, lanes = inputs.delta, part.size - 1, VECTOR_BYTES // dts.itemsize
    bias = load(inputs.delta_bias, k * inputs.dim + c, inputs.dim - c)
    row = b * delta.batch + k * delta.group
    for i in range(0, part.size, _POSITIONS_AT_ONCE):
        at_0, at_1 = row + part[i] * delta.position, row + part[min(i + 1, last)] * delta.position
        at_2 = row + part[min(i + 2, last)] * delta.position
        at_3 = row + part[min(i + 3, last)] * delta.position
        dt_0 = dt_1 = dt_2 = dt_3 = bias
        for r in range(inputs.rank):
            w = load(weight, r * lanes, lanes)
            dt_0, dt_1 = (
                dt_0 + w * load_broadcast(delta.memory, at_0 + r),
                dt_1 + w * load_broadcast(delta.memory, at_1 + r),
            )
            dt_2, dt_3 = (
                dt_2 + w * load_broadcast(delta.memory, at_2 + r),
                dt_3 + w * load_broadcast(delta.memory, at_3 + r),
            )
        if inputs.softplus:
            dt_0, dt_1, dt_2, dt_3 = softplus(dt_0), softplus(dt_1), softplus(dt_2), softplus(dt_3)
        store(dts, i * lanes, dt_0, lanes)
        store(dts, (i + 1) * lanes, dt_1, lanes)
        store(dts, (i + 2) * lanes, dt_2, lanes)
        store(dts, (i + 3) * lanes, dt_3, lanes)


@njit(forceinline=True)
def _scan_part(
    inputs: Operands,
    rows: Any,
    dts: Any,
    part: Any,
    b: int,
    k: int,
    c: int,
    x: _Column,
    delta: _Column,
    z: _Column,
    out: _Column,
    transposed: bool,
    accumulate: bool,
) -> None:
    """Scan a part of the sequence with the states in `rows` and write the output."""
    B, C = inputs.B, inputs.C
    lanes, count = VECTOR_BYTES // rows.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    skip = load(inputs.D, k * inputs.dim + c, count)
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    A_0, h_0 = load(rows, 0, lanes), load(rows, lanes, lanes)
    for i in range(part.size):
        p = part[i]
        q = i if transposed else p
        if inputs.rank:
            dt = load(dts, i * lanes, lanes)
        else:
            dt = _load_dt(delta.memory, delta.at + q * delta.step, bias, inputs.softplus, count)
        x_p = load(x.memory, x.at + q * x.step, count)
        dt_x, y = dt * x_p, skip * x_p
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        if inputs.states == 1:
            # As in VMamba: the only state stays in a register.
            h_0 = exp2(dt * A_0) * h_0 + dt_x * load_broadcast(B.memory, at_B)
            y = y + h_0 * load_broadcast(C.memory, at_C)
        else:
            for n in range(inputs.states):
                A_n, h_n = load(rows, 2 * n * lanes, lanes), load(rows, (2 * n + 1) * lanes, lanes)
                h_n = exp2(dt * A_n) * h_n + dt_x * load_broadcast(B.memory, at_B + n * B.last)
                store(rows, (2 * n + 1) * lanes, h_n, lanes)
                y = y + h_n * load_broadcast(C.memory, at_C + n * C.last)
        if inputs.gated:
            gate = load(z.memory, z.at + q * z.step, count)
            y = y * (gate * sigmoid(gate))
        at_out = out.at + q * out.step
        if accumulate:
            y = y + load(out.memory, at_out, count)
        store(out.memory, at_out, y, count)
    if inputs.states == 1:
        store(rows, lanes, h_0, lanes)


@njit(forceinline=True)
def _copy_states(rows: Any, to: Any, at: int, states: int, dim: int, count: int) -> None:
    lanes = VECTOR_BYTES // rows.itemsize
    for n in range(states):
        store(to, at + n * dim, load(rows, (2 * n + 1) * lanes, lanes), count)


@kernel
def forward_on_openmp(
    enter: int, threads: int, tasks: int, table: Any, types: tuple[Any, ...], order: Any
) -> int:
    """Run `forward_tasks` for all tasks on PyTorch's OpenMP threads; see `run_on_openmp`."""
    return run_on_openmp(enter, threads, tasks, forward_tasks, (table, types, order))


@njit(forceinline=True)
def _load_dt(delta: Any, at: int, bias: Any, delta_softplus: bool, count: int) -> Any:
    """Load delta, add its bias and apply softplus where enabled."""
    dt = load(delta, at, count) + bias
    return softplus(dt) if delta_softplus else dt


@njit
def _slice_width(dim: int, slices: int, lanes: int) -> int:
    """Return the channels per slice, whole registers; only the last slice may have a partly filled one."""
    registers = (dim + lanes - 1) // lanes
    return (registers + slices - 1) // slices * lanes


class _Scratch(NamedTuple):
    """Vectors of one task, flat.

    Attributes:
        starts: state at the start of each chunk, (chunks, N), where the forward has not saved it.
        decays: decay at each position of the chunk, (T, N).
        states: states of the chunk, from the one before its first position on, (T + 1, N).
        inputs: dt, slope of the softplus, x and gradient of the output at each position of the chunk.
        rows: per state A, the gradient of the state from later positions, and the gradient of A.
    """

    starts: Any
    decays: Any
    states: Any
    inputs: Any
    rows: Any


class _Gradients(NamedTuple):
    """Gradients that the backward reads (out, state) and writes.

    Attributes:
        out: gradient of the output, (B, L, K, D); a group stride of 0 where the groups were summed.
        x: gradient of x; with a group stride of 0 the groups are summed.
        delta: gradient of delta, (B, L, K, D).
        z: gradient of z, (B, L, K, D).
        state: gradient of the last state, (B, K, N, D).
        B: gradient of B, zeros on entry, one per slice: (slices, B, L, K, N).
        C: gradient of C, likewise.
        parameters: gradients of A, D and delta_bias, one per image: (B, K, N + 2, D).
    """

    out: Rows
    x: Rows
    delta: Rows
    z: Rows
    state: Any
    B: Any
    C: Any
    parameters: Any


@kernel
def backward_tasks(first: int, last: int, table: Any, types: tuple[Any, ...], order: Any) -> None:
    """Compute the gradients of the tasks from `first` to before `last`; tasks as in `forward_tasks`.

    Args:
        first: first task.
        last: task after the last one.
        table: `Operands`; four `Rows` and four addresses for `_Gradients`; the address of the saved states,
            or 0 for none.
        types: examples of the dtypes of x, delta, state, z, the gradient of the output and that of x.
        order: positions in scan order, (1, L) or (K, L).
    """
    inputs = read_operands(table, types[0], types[1], types[2], types[3])
    grads = _Gradients(
        read_rows(table, OPERANDS, types[4]),
        read_rows(table, OPERANDS + 5, types[5]),
        read_rows(table, OPERANDS + 10, types[1]),
        read_rows(table, OPERANDS + 15, types[3]),
        memory_at(types[2], table[OPERANDS + 20]),
        memory_at(types[2], table[OPERANDS + 21]),
        memory_at(types[2], table[OPERANDS + 22]),
        memory_at(types[2], table[OPERANDS + 23]),
    )
    saved_states = memory_at(types[2], table[OPERANDS + 24])
    has_saved = table[OPERANDS + 24] != 0
    length, groups, dim, states, chunk = inputs.length, inputs.groups, inputs.dim, inputs.states, inputs.chunk
    lanes = VECTOR_BYTES // inputs.A.itemsize
    width = _slice_width(dim, inputs.slices, lanes)
    chunks = (length + chunk - 1) // chunk
    per_position = states * lanes
    scratch = _Scratch(
        np.empty(0 if has_saved else chunks * per_position, inputs.A.dtype),
        # A few vectors more, since many are summed at once.
        np.empty(chunk * per_position + lanes * lanes, inputs.A.dtype),
        np.empty((chunk + 1) * per_position + lanes * lanes, inputs.A.dtype),
        np.empty(chunk * VECTORS_PER_POSITION * lanes, inputs.A.dtype),
        np.empty(3 * per_position, inputs.A.dtype),
    )
    transposed = _reads_sequences(inputs) or _writes_sequences(grads, inputs.gated)
    size = _scratch_size(transposed, lanes)
    x_scratch, delta_scratch = np.empty(size, types[0].dtype), np.empty(size, types[1].dtype)
    z_scratch, out_scratch = np.empty(size, types[3].dtype), np.empty(size, types[4].dtype)
    grad_x_scratch = np.empty(size, types[5].dtype)
    # A chunk is a whole number of parts but for its last part.
    step = TRANSPOSED_POSITIONS if transposed else chunk
    for task in range(first, last):
        b, s = task // inputs.slices, task % inputs.slices
        for k in range(groups):
            positions = order[k if order.shape[0] > 1 else 0]
            at_projection = ((s * inputs.batch + b) * length * groups + k) * states
            for c in range(s * width, min((s + 1) * width, dim), lanes):
                count = dim - c
                x = _column(inputs.x, x_scratch, transposed, b, k, c, lanes)
                delta = _column(inputs.delta, delta_scratch, transposed, b, k, c, lanes)
                z = _column(inputs.z, z_scratch, transposed, b, k, c, lanes)
                grad_out = _column(grads.out, out_scratch, transposed, b, k, c, lanes)
                # The gradients of z and delta overwrite them in scratch memory.
                grad_z = _column(grads.z, z_scratch, transposed, b, k, c, lanes)
                grad_delta = _column(grads.delta, delta_scratch, transposed, b, k, c, lanes)
                grad_x = _column(grads.x, grad_x_scratch, transposed, b, k, c, lanes)
                accumulate = k > 0 and grads.x.group == 0
                _begin(inputs, scratch, grads.state, b, k, c)
                for t in range(0, 0 if has_saved else (chunks - 1) * chunk, step):
                    part = positions[t : min(t + step, (chunks - 1) * chunk)]
                    if transposed:
                        _gather_inputs(inputs, x_scratch, delta_scratch, z_scratch, part, b, k, c, False)
                    _recompute_starts(inputs, scratch, part, t, b, k, c, x, delta, transposed)
                grad_D, grad_bias = broadcast(inputs.A.dtype.type(0)), broadcast(inputs.A.dtype.type(0))
                for j in range(chunks - 1, -1, -1):
                    part = positions[j * chunk : (j + 1) * chunk]
                    row = ((b * groups + k) * (chunks - 1) + j - 1) * states
                    _load_start(scratch, saved_states, has_saved, j, row * dim + c, states, dim, count)
                    for t in range(0, part.size, step):
                        piece = part[t : t + step]
                        if transposed:
                            _gather_inputs(
                                inputs, x_scratch, delta_scratch, z_scratch, piece, b, k, c, inputs.gated
                            )
                            _gather(grads.out, out_scratch, piece, b, k, c, count, lanes)
                        _recompute_chunk(
                            inputs, scratch, piece, t, b, k, c, x, delta, z, grad_out, grad_z, transposed
                        )
                        if transposed and inputs.gated:
                            _scatter(grads.z, z_scratch, piece, b, k, c, count, lanes)
                    for t in range((part.size - 1) // step * step, -1, -step):
                        piece = part[t : t + step]
                        piece_D, piece_bias = _scan_chunk_backward(
                            inputs, scratch, piece, t, b, k, c, grad_x, grad_delta, transposed, accumulate
                        )
                        grad_D, grad_bias = grad_D + piece_D, grad_bias + piece_bias
                        if transposed:
                            _scatter(grads.x, grad_x_scratch, piece, b, k, c, count, lanes)
                            _scatter(grads.delta, delta_scratch, piece, b, k, c, count, lanes)
                    _add_lane_sums(scratch.decays, 0, part, states, grads.B, at_projection, groups * states)
                    _add_lane_sums(
                        scratch.states, per_position, part, states, grads.C, at_projection, groups * states
                    )
                at = (b * groups + k) * (states + 2) * dim + c
                _store_parameters(scratch.rows, grads.parameters, at, states, dim, grad_D, grad_bias, count)


@kernel
def backward_on_openmp(
    enter: int, threads: int, tasks: int, table: Any, types: tuple[Any, ...], order: Any
) -> int:
    """Run `backward_tasks` for all tasks on PyTorch's OpenMP threads; see `run_on_openmp`."""
    return run_on_openmp(enter, threads, tasks, backward_tasks, (table, types, order))


@njit(forceinline=True)
def _writes_sequences(grads: _Gradients, gated: bool) -> bool:
    """Return whether a gradient has positions instead of channels innermost in memory."""
    inner = grads.out.last != 1 or grads.x.last != 1 or grads.delta.last != 1
    return inner or (gated and grads.z.last != 1)


@njit(forceinline=True)
def _load_start(
    scratch: _Scratch,
    saved_states: Any,
    has_saved: bool,
    j: int,
    at_saved: int,
    states: int,
    dim: int,
    count: int,
) -> None:
    """Load the states at the start of chunk `j`, saved by the forward or found by one more scan."""
    lanes = VECTOR_BYTES // scratch.states.itemsize
    for n in range(states):
        start = broadcast(scratch.states.dtype.type(0))
        if j > 0 and has_saved:
            start = load(saved_states, at_saved + n * dim, count)
        elif j > 0:
            start = load(scratch.starts, (j * states + n) * lanes, lanes)
        store(scratch.states, n * lanes, start, lanes)


@njit(forceinline=True)
def _store_parameters(
    rows: Any, to: Any, at: int, states: int, dim: int, grad_D: Any, grad_bias: Any, count: int
) -> None:
    """Store the gradients of A, D and delta_bias."""
    lanes = VECTOR_BYTES // rows.itemsize
    for n in range(states):
        store(to, at + n * dim, load(rows, (3 * n + 2) * lanes, lanes), count)
    store(to, at + states * dim, grad_D, count)
    store(to, at + (states + 1) * dim, grad_bias, count)


@njit(forceinline=True)
def _begin(inputs: Operands, scratch: _Scratch, grad_state: Any, b: int, k: int, c: int) -> None:
    """Initialize `rows` with A, the gradient of the last state, and zero for the gradient of A."""
    lanes, count, rows = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c, scratch.rows
    for n in range(inputs.states):
        row = 3 * n * lanes
        store(rows, row, load(inputs.A, (k * inputs.states + n) * inputs.dim + c, count), lanes)
        at_state = ((b * inputs.groups + k) * inputs.states + n) * inputs.dim + c
        store(rows, row + lanes, load(grad_state, at_state, count), lanes)
        store(rows, row + 2 * lanes, broadcast(rows.dtype.type(0)), lanes)


@njit(forceinline=True)
def _recompute_starts(
    inputs: Operands,
    scratch: _Scratch,
    part: Any,
    first: int,
    b: int,
    k: int,
    c: int,
    x: _Column,
    delta: _Column,
    transposed: bool,
) -> None:
    """Scan a part of the sequence, from step `first` on, to find the state at the start of each chunk."""
    B = inputs.B
    states, chunk = inputs.states, inputs.chunk
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    row_B = b * B.batch + k * B.group
    state = scratch.states
    if first == 0:
        for n in range(states):
            store(state, n * lanes, broadcast(state.dtype.type(0)), lanes)
    for i in range(part.size):
        p, t = part[i], first + i
        q = i if transposed else p
        dt = _load_dt(delta.memory, delta.at + q * delta.step, bias, inputs.softplus, count)
        dt_x = dt * load(x.memory, x.at + q * x.step, count)
        at_B = row_B + p * B.position
        boundary = (t + 1) % chunk == 0
        for n in range(states):
            at = n * lanes
            h = exp(dt * load(scratch.rows, 3 * at, lanes)) * load(state, at, lanes)
            h = h + dt_x * B.memory[at_B + n * B.last]
            store(state, at, h, lanes)
            if boundary:
                store(scratch.starts, (t + 1) // chunk * states * lanes + at, h, lanes)


@njit(forceinline=True)
def _recompute_chunk(
    inputs: Operands,
    scratch: _Scratch,
    part: Any,
    first: int,
    b: int,
    k: int,
    c: int,
    x: _Column,
    delta: _Column,
    z: _Column,
    grad_out: _Column,
    grad_z: _Column,
    transposed: bool,
) -> None:
    """Recompute the states and decays of a part of a chunk, from step `first` on, and load its inputs.

    Writes the gradient of z.
    """
    B, C, states = inputs.B, inputs.C, inputs.states
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    skip = load(inputs.D, k * inputs.dim + c, count)
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    for i in range(part.size):
        p = part[i]
        q = i if transposed else p
        dt = load(delta.memory, delta.at + q * delta.step, count) + bias
        slope = broadcast(inputs.A.dtype.type(1))
        if inputs.softplus:
            dt, slope = softplus_and_slope(dt)
        x_p = load(x.memory, x.at + q * x.step, count)
        dt_x, y = dt * x_p, skip * x_p
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        for n in range(states):
            at = ((first + i) * states + n) * lanes
            decay = exp(dt * load(scratch.rows, 3 * n * lanes, lanes))
            h = decay * load(scratch.states, at, lanes) + dt_x * B.memory[at_B + n * B.last]
            store(scratch.decays, at, decay, lanes)
            store(scratch.states, at + states * lanes, h, lanes)
            if inputs.gated:
                y = y + h * C.memory[at_C + n * C.last]
        grad_y = load(grad_out.memory, grad_out.at + q * grad_out.step, count)
        if inputs.gated:
            gate = load(z.memory, z.at + q * z.step, count)
            opened = sigmoid(gate)
            grad_gate = grad_y * y * opened * (1.0 + gate * (1.0 - opened))
            store(grad_z.memory, grad_z.at + q * grad_z.step, grad_gate, count)
            grad_y = grad_y * (gate * opened)
        at = (first + i) * VECTORS_PER_POSITION * lanes
        store(scratch.inputs, at, dt, lanes)
        store(scratch.inputs, at + lanes, slope, lanes)
        store(scratch.inputs, at + 2 * lanes, x_p, lanes)
        store(scratch.inputs, at + 3 * lanes, grad_y, lanes)


@njit(forceinline=True)
def _scan_chunk_backward(
    inputs: Operands,
    scratch: _Scratch,
    part: Any,
    first: int,
    b: int,
    k: int,
    c: int,
    grad_x: _Column,
    grad_delta: _Column,
    transposed: bool,
    accumulate: bool,
) -> tuple[Any, Any]:
    """Go through a part of a chunk in reverse with the gradient of the state, down to step `first`.

    Writes the gradients of x and delta.

    Leaves the contribution of each channel to the gradients of B and C in the scratch, in place of decays and
    states.

    Returns:
        The gradients of D and delta_bias from this part.
    """
    B, C, states = inputs.B, inputs.C, inputs.states
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    skip = load(inputs.D, k * inputs.dim + c, count)
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    grad_D = grad_bias = broadcast(inputs.A.dtype.type(0))
    for i in range(part.size - 1, -1, -1):
        p = part[i]
        q = i if transposed else p
        at = (first + i) * VECTORS_PER_POSITION * lanes
        dt, x_p = load(scratch.inputs, at, lanes), load(scratch.inputs, at + 2 * lanes, lanes)
        grad_y = load(scratch.inputs, at + 3 * lanes, lanes)
        dt_x = dt * x_p
        grad_dt_x = grad_decay = broadcast(inputs.A.dtype.type(0))
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        for n in range(states):
            row, before = 3 * n * lanes, ((first + i) * states + n) * lanes
            after = before + states * lanes
            grad_h = grad_y * C.memory[at_C + n * C.last] + load(scratch.rows, row + lanes, lanes)
            carried = grad_h * load(scratch.decays, before, lanes)
            store(scratch.rows, row + lanes, carried, lanes)
            # Decay and later state are not needed again: their memory is reused for the gradients of B and C,
            # which are summed over the lanes for many positions at once.
            store(scratch.decays, before, grad_h * dt_x, lanes)
            store(scratch.states, after, grad_y * load(scratch.states, after, lanes), lanes)
            grad_exponent = carried * load(scratch.states, before, lanes)
            grad_A = load(scratch.rows, row + 2 * lanes, lanes) + grad_exponent * dt
            store(scratch.rows, row + 2 * lanes, grad_A, lanes)
            grad_dt_x = grad_dt_x + grad_h * B.memory[at_B + n * B.last]
            grad_decay = grad_decay + grad_exponent * load(scratch.rows, row, lanes)
        grad_dt = (grad_dt_x * x_p + grad_decay) * load(scratch.inputs, at + lanes, lanes)
        store(grad_delta.memory, grad_delta.at + q * grad_delta.step, grad_dt, count)
        grad_D, grad_bias = grad_D + grad_y * x_p, grad_bias + grad_dt
        grad_input = grad_dt_x * dt + skip * grad_y
        at_x = grad_x.at + q * grad_x.step
        if accumulate:
            grad_input = grad_input + load(grad_x.memory, at_x, count)
        store(grad_x.memory, at_x, grad_input, count)
    return grad_D, grad_bias


@njit(forceinline=True)
def _add_lane_sums(
    rows: Any, start: int, part: Any, states: int, grad: Any, at_grad: int, stride: int
) -> None:
    """Sum the vectors (T, N) of a chunk over their lanes and add the sums to the gradient of B or C."""
    lanes = VECTOR_BYTES // rows.itemsize
    for v in range(0, part.size * states, lanes):
        # The sums overwrite the first of the summed vectors.
        store(rows, start + v, lane_sums(rows, start + v * lanes), lanes)
    for i in range(part.size):
        at = at_grad + part[i] * stride
        if states == 1:
            grad[at] += rows[start + i]
        else:
            for n in range(0, states, lanes):
                sums = load(rows, start + i * states + n, states - n)
                store(grad, at + n, load(grad, at + n, states - n) + sums, states - n)
