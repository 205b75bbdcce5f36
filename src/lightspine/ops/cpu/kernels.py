"""Compiled CPU kernels of the selective scan, forward and backward.

A kernel processes one register of channels at a time, 16 float32 or 8 float64, over the whole sequence. It
receives all tensors in one table of integers: sizes, then addresses and strides. Only the channels have to be
contiguous, so tokens, feature maps and slices of a projection are read in place. `order` lists the position
that each scan step visits, so a direction needs no copy.

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
from lightspine.ops.cpu.config import VECTORS_PER_POSITION
from lightspine.ops.cpu.openmp import run_on_openmp
from lightspine.ops.cpu.simd import VECTOR_BYTES, broadcast, lane_sums, load, load_broadcast, store
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
        last: stride of X: of the states of B and C; 1 for channels.
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
                    part = positions[t : t + inputs.chunk]
                    if inputs.rank:
                        _project_dt(inputs, weight, dts, part, b, k, c)
                    _scan_part(inputs, rows, dts, part, b, k, c, out)
                _copy_states(rows, state, (b * groups + k) * states * dim + c, states, dim, count)


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
def _scan_part(inputs: Operands, rows: Any, dts: Any, part: Any, b: int, k: int, c: int, out: Rows) -> None:
    """Scan a part of the sequence with the states in `rows` and write the output."""
    x, delta, B, C, z = inputs.x, inputs.delta, inputs.B, inputs.C, inputs.z
    lanes, count = VECTOR_BYTES // rows.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    skip = load(inputs.D, k * inputs.dim + c, count)
    row_x, row_delta = b * x.batch + k * x.group + c, b * delta.batch + k * delta.group + c
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    row_z, row_out = b * z.batch + k * z.group + c, b * out.batch + k * out.group + c
    accumulate = k > 0 and out.group == 0
    A_0, h_0 = load(rows, 0, lanes), load(rows, lanes, lanes)
    for i in range(part.size):
        p = part[i]
        if inputs.rank:
            dt = load(dts, i * lanes, lanes)
        else:
            dt = _load_dt(delta.memory, row_delta + p * delta.position, bias, inputs.softplus, count)
        x_p = load(x.memory, row_x + p * x.position, count)
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
            gate = load(z.memory, row_z + p * z.position, count)
            y = y * (gate * sigmoid(gate))
        at_out = row_out + p * out.position
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
    for task in range(first, last):
        b, s = task // inputs.slices, task % inputs.slices
        for k in range(groups):
            positions = order[k if order.shape[0] > 1 else 0]
            at_projection = ((s * inputs.batch + b) * length * groups + k) * states
            for c in range(s * width, min((s + 1) * width, dim), lanes):
                count = dim - c
                _begin(inputs, scratch, grads.state, b, k, c)
                if not has_saved:
                    _recompute_starts(inputs, scratch, positions, b, k, c)
                grad_D, grad_bias = broadcast(inputs.A.dtype.type(0)), broadcast(inputs.A.dtype.type(0))
                for j in range(chunks - 1, -1, -1):
                    part = positions[j * chunk : (j + 1) * chunk]
                    for n in range(states):
                        start = broadcast(inputs.A.dtype.type(0))
                        if j > 0 and has_saved:
                            row = ((b * groups + k) * (chunks - 1) + j - 1) * states + n
                            start = load(saved_states, row * dim + c, count)
                        elif j > 0:
                            start = load(scratch.starts, j * per_position + n * lanes, lanes)
                        store(scratch.states, n * lanes, start, lanes)
                    _recompute_chunk(inputs, scratch, part, grads.out, grads.z, b, k, c)
                    chunk_D, chunk_bias = _scan_chunk_backward(inputs, scratch, part, grads, b, k, c)
                    grad_D, grad_bias = grad_D + chunk_D, grad_bias + chunk_bias
                    _add_lane_sums(scratch.decays, 0, part, states, grads.B, at_projection, groups * states)
                    _add_lane_sums(
                        scratch.states, per_position, part, states, grads.C, at_projection, groups * states
                    )
                at = (b * groups + k) * (states + 2) * dim + c
                for n in range(states):
                    row = load(scratch.rows, (3 * n + 2) * lanes, lanes)
                    store(grads.parameters, at + n * dim, row, count)
                store(grads.parameters, at + states * dim, grad_D, count)
                store(grads.parameters, at + (states + 1) * dim, grad_bias, count)


@kernel
def backward_on_openmp(
    enter: int, threads: int, tasks: int, table: Any, types: tuple[Any, ...], order: Any
) -> int:
    """Run `backward_tasks` for all tasks on PyTorch's OpenMP threads; see `run_on_openmp`."""
    return run_on_openmp(enter, threads, tasks, backward_tasks, (table, types, order))


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
def _recompute_starts(inputs: Operands, scratch: _Scratch, positions: Any, b: int, k: int, c: int) -> None:
    """Scan all chunks but the last to find the state at the start of each."""
    x, delta, B = inputs.x, inputs.delta, inputs.B
    states, chunk = inputs.states, inputs.chunk
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    at_x, at_delta = b * x.batch + k * x.group + c, b * delta.batch + k * delta.group + c
    row_B = b * B.batch + k * B.group
    state = scratch.states
    for n in range(states):
        store(state, n * lanes, broadcast(state.dtype.type(0)), lanes)
    for t in range((inputs.length - 1) // chunk * chunk):
        p = positions[t]
        dt = _load_dt(delta.memory, at_delta + p * delta.position, bias, inputs.softplus, count)
        dt_x = dt * load(x.memory, at_x + p * x.position, count)
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
    inputs: Operands, scratch: _Scratch, part: Any, grad_out: Rows, grad_z: Rows, b: int, k: int, c: int
) -> None:
    """Recompute the states and decays of a chunk and load its inputs; write the gradient of z."""
    x, delta, B, C, z, states = inputs.x, inputs.delta, inputs.B, inputs.C, inputs.z, inputs.states
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    skip = load(inputs.D, k * inputs.dim + c, count)
    at_x, at_delta = b * x.batch + k * x.group + c, b * delta.batch + k * delta.group + c
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    at_z, at_grad_z = b * z.batch + k * z.group + c, b * grad_z.batch + k * grad_z.group + c
    at_out = b * grad_out.batch + k * grad_out.group + c
    for i in range(part.size):
        p = part[i]
        dt = load(delta.memory, at_delta + p * delta.position, count) + bias
        slope = broadcast(inputs.A.dtype.type(1))
        if inputs.softplus:
            dt, slope = softplus_and_slope(dt)
        x_p = load(x.memory, at_x + p * x.position, count)
        dt_x, y = dt * x_p, skip * x_p
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        for n in range(states):
            at = (i * states + n) * lanes
            decay = exp(dt * load(scratch.rows, 3 * n * lanes, lanes))
            h = decay * load(scratch.states, at, lanes) + dt_x * B.memory[at_B + n * B.last]
            store(scratch.decays, at, decay, lanes)
            store(scratch.states, at + states * lanes, h, lanes)
            if inputs.gated:
                y = y + h * C.memory[at_C + n * C.last]
        grad_y = load(grad_out.memory, at_out + p * grad_out.position, count)
        if inputs.gated:
            gate = load(z.memory, at_z + p * z.position, count)
            opened = sigmoid(gate)
            grad_gate = grad_y * y * opened * (1.0 + gate * (1.0 - opened))
            store(grad_z.memory, at_grad_z + p * grad_z.position, grad_gate, count)
            grad_y = grad_y * (gate * opened)
        at = i * VECTORS_PER_POSITION * lanes
        store(scratch.inputs, at, dt, lanes)
        store(scratch.inputs, at + lanes, slope, lanes)
        store(scratch.inputs, at + 2 * lanes, x_p, lanes)
        store(scratch.inputs, at + 3 * lanes, grad_y, lanes)


@njit(forceinline=True)
def _scan_chunk_backward(
    inputs: Operands, scratch: _Scratch, part: Any, grads: _Gradients, b: int, k: int, c: int
) -> tuple[Any, Any]:
    """Go through a chunk in reverse with the gradient of the state; write the gradients of x and delta.

    Leaves the contribution of each channel to the gradients of B and C in the scratch, in place of decays and
    states.

    Returns:
        The gradients of D and delta_bias from this chunk.
    """
    x, delta, B, C, states = grads.x, grads.delta, inputs.B, inputs.C, inputs.states
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    skip = load(inputs.D, k * inputs.dim + c, count)
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    at_x, at_delta = b * x.batch + k * x.group + c, b * delta.batch + k * delta.group + c
    accumulate = k > 0 and x.group == 0
    grad_D = grad_bias = broadcast(inputs.A.dtype.type(0))
    for i in range(part.size - 1, -1, -1):
        p = part[i]
        at = i * VECTORS_PER_POSITION * lanes
        dt, x_p = load(scratch.inputs, at, lanes), load(scratch.inputs, at + 2 * lanes, lanes)
        grad_y = load(scratch.inputs, at + 3 * lanes, lanes)
        dt_x = dt * x_p
        grad_dt_x = grad_decay = broadcast(inputs.A.dtype.type(0))
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        for n in range(states):
            row, before = 3 * n * lanes, (i * states + n) * lanes
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
        grad_delta = (grad_dt_x * x_p + grad_decay) * load(scratch.inputs, at + lanes, lanes)
        store(delta.memory, at_delta + p * delta.position, grad_delta, count)
        grad_D, grad_bias = grad_D + grad_y * x_p, grad_bias + grad_delta
        grad_x = grad_dt_x * dt + skip * grad_y
        if accumulate:
            grad_x = grad_x + load(x.memory, at_x + p * x.position, count)
        store(x.memory, at_x + p * x.position, grad_x, count)
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
