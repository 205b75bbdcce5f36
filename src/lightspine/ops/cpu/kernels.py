"""Compiled CPU kernels of the selective scan, forward and backward, one register of channels at a time.

A kernel receives all tensors in one table of integers: sizes, then addresses and strides. Every tensor has
its own strides and only the channels are contiguous, so tokens, slices of a projection and maps are read in
place. `order` lists the position that each scan position visits, so a direction needs no copy.

The backward recomputes states and decays of a chunk into scratch memory of a fixed size, then traverses the
chunk in reverse with the gradient of the state. The states at the starts of the chunks were saved by the
forward; otherwise the sequence is first scanned once more to find them.

Names: b batch, k group, c first channel of the register, t scan position, i position in a chunk, p position
in memory, n state. `at_...` is the offset of the register's channels at position 0.
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
from lightspine.ops.cpu.config import STEP_ROWS
from lightspine.ops.cpu.openmp import run_on_openmp
from lightspine.ops.cpu.simd import VECTOR_BYTES, broadcast, load, spread, store, totals
from lightspine.ops.cpu.vector_math import LOG2_E, exp, exp2, sigmoid, softplus, softplus_and_slope

# Positions that `_project_steps` computes together.
_AT_ONCE = 4


class Rows(NamedTuple):
    """A tensor (B, L, K, X) inside a kernel: its memory and its strides in elements.

    Attributes:
        memory: flat array without bounds.
        batch: stride of B.
        position: stride of L.
        group: stride of K; 0 where all groups share.
        last: stride of X: of the states of B and C; 1 for channels.
    """

    memory: Any
    batch: int
    position: int
    group: int
    last: int


class Operands(NamedTuple):
    """What both kernels read.

    Attributes:
        batch: images or sequences B.
        length: positions L.
        groups: groups K.
        dim: channels D of a group.
        states: states N.
        slices: slices per image.
        chunk: steps of a chunk.
        softplus: whether the steps pass through softplus.
        rank: R, or 0 where the steps are given for every channel.
        gated: whether there is a gate.
        x: input, (B, L, K, D).
        delta: steps before bias and softplus, (B, L, K, D), or what `step_weight` maps to them, (B, L, K, R).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        z: gate, (B, L, K, D).
        A: state matrices, contiguous (K, N, D).
        D: skips, contiguous (K, D).
        delta_bias: added to delta, contiguous (K, D).
        step_weight: maps R numbers to the steps of all channels, contiguous (K, R, D).
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
    step_weight: Any


# Entries of the table that are `Operands`: nine numbers, five `Rows`, four addresses.
OPERANDS = 9 + 5 * 5 + 4


@intrinsic
def memory_at(typingctx: Any, example: types.Array, address: types.Integer) -> Any:
    """Return the memory from an address on as a flat array of the example's type, whose length is unknown."""

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
    """Return the `Rows` whose five entries begin at `at`."""
    return Rows(memory_at(example, table[at]), table[at + 1], table[at + 2], table[at + 3], table[at + 4])


@njit(forceinline=True)
def read_operands(table: Any, x: Any, delta: Any, state: Any, z: Any) -> Operands:
    """Return what stands at the beginning of a table, given examples of the dtypes."""
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
        table: `Operands`; then `Rows` of the output, with a group stride of 0 where the groups are added up;
            then the addresses of the last state, (B, K, N, D), and of the states at the start of each chunk
            but the first, (B, K, chunks - 1, N, D), 0 to note none.
        types: examples of the dtypes of x, delta, state, z and the output.
        order: positions in the order of the walk, (1, L) or (K, L).
    """
    inputs = read_operands(table, types[0], types[1], types[2], types[3])
    out = read_rows(table, OPERANDS, types[4])
    state, starts = memory_at(types[2], table[OPERANDS + 5]), memory_at(types[2], table[OPERANDS + 6])
    noting = table[OPERANDS + 6] != 0
    groups, dim, states = inputs.groups, inputs.dim, inputs.states
    lanes = VECTOR_BYTES // inputs.A.itemsize
    width = slice_width(dim, inputs.slices, lanes)
    chunks_noted = (inputs.length - 1) // inputs.chunk
    # Two rows per state: that of A, made for powers of 2 in place of those of e, and the running state.
    rows = np.empty(2 * states * lanes, inputs.A.dtype)
    # The projected steps of a part of the walk, and the part of `step_weight` that gives them.
    steps = np.empty((inputs.chunk + _AT_ONCE) * lanes if inputs.rank else 0, inputs.A.dtype)
    weight = np.empty(inputs.rank * lanes, inputs.A.dtype)
    for task in range(first, last):
        b, start = task // inputs.slices, task % inputs.slices * width
        for k in range(groups):
            walk = order[k if order.shape[0] > 1 else 0]
            for c in range(start, min(start + width, dim), lanes):
                count = dim - c
                for n in range(states):
                    row = load(inputs.A, (k * states + n) * dim + c, count) * LOG2_E
                    store(rows, 2 * n * lanes, row, lanes)
                    store(rows, (2 * n + 1) * lanes, broadcast(rows.dtype.type(0)), lanes)
                for r in range(inputs.rank):
                    at_weight = (k * inputs.rank + r) * dim + c
                    store(weight, r * lanes, load(inputs.step_weight, at_weight, count), lanes)
                for t in range(0, inputs.length, inputs.chunk):
                    if t > 0 and noting:
                        kept = (b * groups + k) * chunks_noted + t // inputs.chunk - 1
                        _copy_states(rows, starts, kept * states * dim + c, states, dim, count)
                    part = walk[t : t + inputs.chunk]
                    if inputs.rank:
                        _project_steps(inputs, weight, steps, part, b, k, c)
                    _walk_part(inputs, rows, steps, part, b, k, c, out)
                _copy_states(rows, state, (b * groups + k) * states * dim + c, states, dim, count)


@njit(forceinline=True)
def _project_steps(inputs: Operands, weight: Any, steps: Any, part: Any, b: int, k: int, c: int) -> None:
    """Write the step sizes of a part of the walk, four at a time: a row of the weight is loaded once."""
    delta, last, lanes = inputs.delta, part.size - 1, VECTOR_BYTES // steps.itemsize
    bias = load(inputs.delta_bias, k * inputs.dim + c, inputs.dim - c)
    row = b * delta.batch + k * delta.group
    for i in range(0, part.size, _AT_ONCE):
        at_0, at_1 = row + part[i] * delta.position, row + part[min(i + 1, last)] * delta.position
        at_2 = row + part[min(i + 2, last)] * delta.position
        at_3 = row + part[min(i + 3, last)] * delta.position
        dt_0 = dt_1 = dt_2 = dt_3 = bias
        for r in range(inputs.rank):
            w = load(weight, r * lanes, lanes)
            dt_0, dt_1 = dt_0 + w * spread(delta.memory, at_0 + r), dt_1 + w * spread(delta.memory, at_1 + r)
            dt_2, dt_3 = dt_2 + w * spread(delta.memory, at_2 + r), dt_3 + w * spread(delta.memory, at_3 + r)
        if inputs.softplus:
            dt_0, dt_1, dt_2, dt_3 = softplus(dt_0), softplus(dt_1), softplus(dt_2), softplus(dt_3)
        store(steps, i * lanes, dt_0, lanes)
        store(steps, (i + 1) * lanes, dt_1, lanes)
        store(steps, (i + 2) * lanes, dt_2, lanes)
        store(steps, (i + 3) * lanes, dt_3, lanes)


@njit(forceinline=True)
def _walk_part(inputs: Operands, rows: Any, steps: Any, part: Any, b: int, k: int, c: int, out: Rows) -> None:
    """Take the states in `rows` over the steps of a part of the walk and write the output."""
    x, delta, B, C, z = inputs.x, inputs.delta, inputs.B, inputs.C, inputs.z
    lanes, count = VECTOR_BYTES // rows.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    skip = load(inputs.D, k * inputs.dim + c, count)
    row_x, row_delta = b * x.batch + k * x.group + c, b * delta.batch + k * delta.group + c
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    row_z, row_out = b * z.batch + k * z.group + c, b * out.batch + k * out.group + c
    added_up = k > 0 and out.group == 0
    A_0, h_0 = load(rows, 0, lanes), load(rows, lanes, lanes)
    for i in range(part.size):
        p = part[i]
        if inputs.rank:
            dt = load(steps, i * lanes, lanes)
        else:
            dt = step_size(delta.memory, row_delta + p * delta.position, bias, inputs.softplus, count)
        value = load(x.memory, row_x + p * x.position, count)
        added, y = dt * value, skip * value
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        if inputs.states == 1:
            # VMamba's case: the only state stays in a register.
            h_0 = exp2(dt * A_0) * h_0 + added * spread(B.memory, at_B)
            y = y + h_0 * spread(C.memory, at_C)
        else:
            for n in range(inputs.states):
                A_n, h_n = load(rows, 2 * n * lanes, lanes), load(rows, (2 * n + 1) * lanes, lanes)
                h_n = exp2(dt * A_n) * h_n + added * spread(B.memory, at_B + n * B.last)
                store(rows, (2 * n + 1) * lanes, h_n, lanes)
                y = y + h_n * spread(C.memory, at_C + n * C.last)
        if inputs.gated:
            gate = load(z.memory, row_z + p * z.position, count)
            y = y * (gate * sigmoid(gate))
        at_out = row_out + p * out.position
        if added_up:
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
    """Run `forward_tasks` for all tasks on PyTorch's threads; see `openmp.run_on_openmp`."""
    return run_on_openmp(enter, threads, tasks, forward_tasks, (table, types, order))


@njit(forceinline=True)
def step_size(delta: Any, at: int, bias: Any, delta_softplus: bool, count: int) -> Any:
    """Read delta, add its bias, and pass it through softplus where asked for."""
    dt = load(delta, at, count) + bias
    return softplus(dt) if delta_softplus else dt


@njit
def slice_width(dim: int, slices: int, lanes: int) -> int:
    """Return the channels per slice: whole registers, so that only the last slice may have a ragged end."""
    registers = (dim + lanes - 1) // lanes
    return (registers + slices - 1) // slices * lanes


class _Scratch(NamedTuple):
    """Vectors of one task, flat.

    Attributes:
        starts: state at the start of each chunk, (chunks, N), where the forward has not noted it.
        decays: decay of each step of the chunk, (T, N).
        history: states of the chunk, from the one before its first step on, (T + 1, N).
        steps: the STEP_ROWS vectors of each step of the chunk.
        rows: per state the row of A, what the adjoint brings from the right, and the gradient of A.
    """

    starts: Any
    decays: Any
    history: Any
    steps: Any
    rows: Any


class _Gradients(NamedTuple):
    """What flows in, and where results go.

    Attributes:
        out: gradient of the output, (B, L, K, D); a group stride of 0 where the groups were added up.
        x: gradient of x; with a group stride of 0 the groups are added up.
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
        table: `Operands`; four `Rows` and four addresses, which are `_Gradients`; then the address of the
            states that the forward noted, 0 for none.
        types: examples of the dtypes of x, delta, state, z, the gradient of the output and that of x.
        order: positions in the order of the walk, (1, L) or (K, L).
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
    noted = memory_at(types[2], table[OPERANDS + 24])
    has_noted = table[OPERANDS + 24] != 0
    length, groups, dim, states, chunk = inputs.length, inputs.groups, inputs.dim, inputs.states, inputs.chunk
    lanes = VECTOR_BYTES // inputs.A.itemsize
    width = slice_width(dim, inputs.slices, lanes)
    chunks = (length + chunk - 1) // chunk
    per_step = states * lanes
    scratch = _Scratch(
        np.empty(0 if has_noted else chunks * per_step, inputs.A.dtype),
        # A few vectors more, since sums are taken of many at once.
        np.empty(chunk * per_step + lanes * lanes, inputs.A.dtype),
        np.empty((chunk + 1) * per_step + lanes * lanes, inputs.A.dtype),
        np.empty(chunk * STEP_ROWS * lanes, inputs.A.dtype),
        np.empty(3 * per_step, inputs.A.dtype),
    )
    for task in range(first, last):
        b, s = task // inputs.slices, task % inputs.slices
        for k in range(groups):
            walk = order[k if order.shape[0] > 1 else 0]
            at_projection = ((s * inputs.batch + b) * length * groups + k) * states
            for c in range(s * width, min((s + 1) * width, dim), lanes):
                count = dim - c
                _begin(inputs, scratch, grads.state, b, k, c)
                if not has_noted:
                    _find_starts(inputs, scratch, walk, b, k, c)
                grad_D, grad_bias = broadcast(inputs.A.dtype.type(0)), broadcast(inputs.A.dtype.type(0))
                for j in range(chunks - 1, -1, -1):
                    part = walk[j * chunk : (j + 1) * chunk]
                    for n in range(states):
                        start = broadcast(inputs.A.dtype.type(0))
                        if j > 0 and has_noted:
                            row = ((b * groups + k) * (chunks - 1) + j - 1) * states + n
                            start = load(noted, row * dim + c, count)
                        elif j > 0:
                            start = load(scratch.starts, j * per_step + n * lanes, lanes)
                        store(scratch.history, n * lanes, start, lanes)
                    _replay(inputs, scratch, part, grads.out, grads.z, b, k, c)
                    by_skip, by_bias = _walk_back(inputs, scratch, part, grads, b, k, c)
                    grad_D, grad_bias = grad_D + by_skip, grad_bias + by_bias
                    _add_totals(scratch.decays, 0, part, states, grads.B, at_projection, groups * states)
                    _add_totals(
                        scratch.history, per_step, part, states, grads.C, at_projection, groups * states
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
    """Run `backward_tasks` for all tasks on PyTorch's threads; see `openmp.run_on_openmp`."""
    return run_on_openmp(enter, threads, tasks, backward_tasks, (table, types, order))


@njit(forceinline=True)
def _begin(inputs: Operands, scratch: _Scratch, grad_state: Any, b: int, k: int, c: int) -> None:
    """Fill `rows`: A, the gradient of the last state, and a gradient of A that is still zero."""
    lanes, count, rows = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c, scratch.rows
    for n in range(inputs.states):
        row = 3 * n * lanes
        store(rows, row, load(inputs.A, (k * inputs.states + n) * inputs.dim + c, count), lanes)
        at_state = ((b * inputs.groups + k) * inputs.states + n) * inputs.dim + c
        store(rows, row + lanes, load(grad_state, at_state, count), lanes)
        store(rows, row + 2 * lanes, broadcast(rows.dtype.type(0)), lanes)


@njit(forceinline=True)
def _find_starts(inputs: Operands, scratch: _Scratch, walk: Any, b: int, k: int, c: int) -> None:
    """Walk all chunks but the last and note the state at the start of each."""
    x, delta, B = inputs.x, inputs.delta, inputs.B
    states, chunk = inputs.states, inputs.chunk
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    bias = load(inputs.delta_bias, k * inputs.dim + c, count)
    at_x, at_delta = b * x.batch + k * x.group + c, b * delta.batch + k * delta.group + c
    row_B = b * B.batch + k * B.group
    state = scratch.history
    for n in range(states):
        store(state, n * lanes, broadcast(state.dtype.type(0)), lanes)
    for t in range((inputs.length - 1) // chunk * chunk):
        p = walk[t]
        dt = step_size(delta.memory, at_delta + p * delta.position, bias, inputs.softplus, count)
        added = dt * load(x.memory, at_x + p * x.position, count)
        at_B = row_B + p * B.position
        boundary = (t + 1) % chunk == 0
        for n in range(states):
            at = n * lanes
            h = exp(dt * load(scratch.rows, 3 * at, lanes)) * load(state, at, lanes)
            h = h + added * B.memory[at_B + n * B.last]
            store(state, at, h, lanes)
            if boundary:
                store(scratch.starts, (t + 1) // chunk * states * lanes + at, h, lanes)


@njit(forceinline=True)
def _replay(
    inputs: Operands, scratch: _Scratch, part: Any, grad_out: Rows, grad_z: Rows, b: int, k: int, c: int
) -> None:
    """Compute again the states and decays of a chunk and what its steps take in; write the gradient of z."""
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
        value = load(x.memory, at_x + p * x.position, count)
        added, y = dt * value, skip * value
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        for n in range(states):
            at = (i * states + n) * lanes
            decay = exp(dt * load(scratch.rows, 3 * n * lanes, lanes))
            h = decay * load(scratch.history, at, lanes) + added * B.memory[at_B + n * B.last]
            store(scratch.decays, at, decay, lanes)
            store(scratch.history, at + states * lanes, h, lanes)
            if inputs.gated:
                y = y + h * C.memory[at_C + n * C.last]
        grad_y = load(grad_out.memory, at_out + p * grad_out.position, count)
        if inputs.gated:
            gate = load(z.memory, at_z + p * z.position, count)
            opening = sigmoid(gate)
            by_gate = grad_y * y * opening * (1.0 + gate * (1.0 - opening))
            store(grad_z.memory, at_grad_z + p * grad_z.position, by_gate, count)
            grad_y = grad_y * (gate * opening)
        at = i * STEP_ROWS * lanes
        store(scratch.steps, at, dt, lanes)
        store(scratch.steps, at + lanes, slope, lanes)
        store(scratch.steps, at + 2 * lanes, value, lanes)
        store(scratch.steps, at + 3 * lanes, grad_y, lanes)


@njit(forceinline=True)
def _walk_back(
    inputs: Operands, scratch: _Scratch, part: Any, grads: _Gradients, b: int, k: int, c: int
) -> tuple[Any, Any]:
    """Take the adjoint from the last step of a chunk to its first; write the gradients of x and delta.

    Leaves what the channels add to the gradients of B and C in the scratch, in place of decays and states.

    Returns:
        The gradients of D and delta_bias from this chunk.
    """
    x, delta, B, C, states = grads.x, grads.delta, inputs.B, inputs.C, inputs.states
    lanes, count = VECTOR_BYTES // inputs.A.itemsize, inputs.dim - c
    skip = load(inputs.D, k * inputs.dim + c, count)
    row_B, row_C = b * B.batch + k * B.group, b * C.batch + k * C.group
    at_x, at_delta = b * x.batch + k * x.group + c, b * delta.batch + k * delta.group + c
    added_up = k > 0 and x.group == 0
    grad_D = grad_bias = broadcast(inputs.A.dtype.type(0))
    for i in range(part.size - 1, -1, -1):
        p = part[i]
        at = i * STEP_ROWS * lanes
        dt, value = load(scratch.steps, at, lanes), load(scratch.steps, at + 2 * lanes, lanes)
        grad_y = load(scratch.steps, at + 3 * lanes, lanes)
        added = dt * value
        by_input = by_decay = broadcast(inputs.A.dtype.type(0))
        at_B, at_C = row_B + p * B.position, row_C + p * C.position
        for n in range(states):
            row, before = 3 * n * lanes, (i * states + n) * lanes
            after = before + states * lanes
            adjoint = grad_y * C.memory[at_C + n * C.last] + load(scratch.rows, row + lanes, lanes)
            flow = adjoint * load(scratch.decays, before, lanes)
            store(scratch.rows, row + lanes, flow, lanes)
            # Decay and later state are not needed again: their places take what the gradients of B and C
            # get, to be summed over the lanes for many steps at once.
            store(scratch.decays, before, adjoint * added, lanes)
            store(scratch.history, after, grad_y * load(scratch.history, after, lanes), lanes)
            through = flow * load(scratch.history, before, lanes)
            by_A = load(scratch.rows, row + 2 * lanes, lanes) + through * dt
            store(scratch.rows, row + 2 * lanes, by_A, lanes)
            by_input = by_input + adjoint * B.memory[at_B + n * B.last]
            by_decay = by_decay + through * load(scratch.rows, row, lanes)
        grad_raw = (by_input * value + by_decay) * load(scratch.steps, at + lanes, lanes)
        store(delta.memory, at_delta + p * delta.position, grad_raw, count)
        grad_D, grad_bias = grad_D + grad_y * value, grad_bias + grad_raw
        grad_x = by_input * dt + skip * grad_y
        if added_up:
            grad_x = grad_x + load(x.memory, at_x + p * x.position, count)
        store(x.memory, at_x + p * x.position, grad_x, count)
    return grad_D, grad_bias


@njit(forceinline=True)
def _add_totals(rows: Any, start: int, part: Any, states: int, grad: Any, at_grad: int, stride: int) -> None:
    """Sum the vectors (T, N) of a chunk over their lanes and add them to the gradient of B or C."""
    lanes = VECTOR_BYTES // rows.itemsize
    for v in range(0, part.size * states, lanes):
        # The sums of vectors that are read go where the first of them stood.
        store(rows, start + v, totals(rows, start + v * lanes), lanes)
    for i in range(part.size):
        at = at_grad + part[i] * stride
        if states == 1:
            grad[at] += rows[start + i]
        else:
            for n in range(0, states, lanes):
                sums = load(rows, start + i * states + n, states - n)
                store(grad, at + n, load(grad, at + n, states - n) + sums, states - n)
