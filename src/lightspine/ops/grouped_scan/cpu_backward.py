"""The backward scan as a compiled kernel: one register full of channels at a time.

A task computes the states of a chunk of the walk again, with the decays, into a scratch of fixed size, and
walks the chunk backwards with the adjoint of the state. The state at the start of each chunk was noted by the
forward; where it was not, the sequence is first walked forwards once more to find it.

Names as in `cpu_forward`: b batch, k group, c first channel of the register, i step of the chunk, p position,
n state. `at_...` is where the register's channels stand at position 0.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from lightspine.ops.grouped_scan.cpu_arguments import (
    OPERANDS,
    Operands,
    Rows,
    memory_at,
    read_operands,
    read_rows,
)
from lightspine.ops.grouped_scan.cpu_chunks import STEP_ROWS
from lightspine.ops.grouped_scan.cpu_compile import kernel
from lightspine.ops.grouped_scan.cpu_forward import slice_width, step_size
from lightspine.ops.grouped_scan.cpu_math import exp, sigmoid, softplus_and_slope
from lightspine.ops.grouped_scan.cpu_team import run_on_team
from lightspine.ops.grouped_scan.simd import VECTOR_BYTES, broadcast, load, store, totals


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
def backward_on_team(
    enter: int, threads: int, tasks: int, table: Any, types: tuple[Any, ...], order: Any
) -> int:
    """Run `backward_tasks` for all tasks on PyTorch's threads; see `cpu_team.run_on_team`."""
    return run_on_team(enter, threads, tasks, backward_tasks, (table, types, order))


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
