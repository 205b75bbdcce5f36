"""The forward scan as a compiled kernel: one register full of channels at a time walks the whole sequence.

Every tensor has its own strides and channels lie next to each other, so tokens, slices of a projection's
output and maps are all read where they lie. `order` names the position that each step of the walk visits: a
direction costs no copy.

Names: b batch, k group, c first channel of the register, t step of the walk, p position, n state.
"""

from typing import Any

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
from lightspine.ops.grouped_scan.cpu_compile import kernel
from lightspine.ops.grouped_scan.cpu_math import LOG2_E, exp2, sigmoid, softplus
from lightspine.ops.grouped_scan.cpu_team import run_on_team
from lightspine.ops.grouped_scan.simd import VECTOR_BYTES, broadcast, load, spread, store

# Steps that `_project_steps` computes together.
_AT_ONCE = 4


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
def forward_on_team(
    enter: int, threads: int, tasks: int, table: Any, types: tuple[Any, ...], order: Any
) -> int:
    """Run `forward_tasks` for all tasks on PyTorch's threads; see `cpu_team.run_on_team`."""
    return run_on_team(enter, threads, tasks, forward_tasks, (table, types, order))


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
