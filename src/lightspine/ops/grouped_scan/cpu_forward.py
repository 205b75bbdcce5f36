"""The forward scan as a compiled kernel: one register full of channels at a time walks the whole sequence.

Arrays are flat, each with its strides (batch, position, group[, state]) in elements; channels lie next to
each other. So tokens, slices of a projection's output and maps are all read where they lie. `order` names the
position that each step of the walk visits: a direction costs no copy.

Names: b batch, k group, c first channel of the register, t step of the walk, p position, n state.
"""

from typing import Any

import numpy as np
from numba import njit

from lightspine.ops.grouped_scan.cpu_math import exp, sigmoid, softplus
from lightspine.ops.grouped_scan.simd import VECTOR_BYTES, broadcast, load, store


@njit(nogil=True, cache=True, error_model="numpy")
def forward_tasks(
    first: int,
    last: int,
    slices: int,
    sizes: tuple[int, int, int, int],
    x: Any,
    x_strides: tuple[int, int, int],
    delta: Any,
    delta_strides: tuple[int, int, int],
    A: Any,
    B: Any,
    B_strides: tuple[int, int, int, int],
    C: Any,
    C_strides: tuple[int, int, int, int],
    D: Any,
    delta_bias: Any,
    z: Any,
    z_strides: tuple[int, int, int],
    order: Any,
    delta_softplus: bool,
    out: Any,
    out_strides: tuple[int, int, int],
    state: Any,
) -> None:
    """Scan the tasks from `first` to before `last`; a task is one image and one slice of its channels.

    Args:
        first: first task.
        last: task after the last one.
        slices: slices per image.
        sizes: length L, groups K, channels D of a group, states N.
        x: input.
        x_strides: its strides; a group stride of 0 lets all groups read the same channels.
        delta: steps before bias and softplus.
        delta_strides: its strides.
        A: state matrices, (K, N, D).
        B: input projections.
        B_strides: its strides.
        C: output projections.
        C_strides: its strides.
        D: skips, (K, D).
        delta_bias: added to delta, (K, D).
        z: gate; an array of size 0 for none.
        z_strides: its strides.
        order: positions in the order of the walk, (1, L) or (K, L).
        delta_softplus: pass the steps through softplus.
        out: output; with a group stride of 0 the groups are added up.
        out_strides: its strides.
        state: last state, (B, K, N, D).
    """
    length, groups, dim, states = sizes
    lanes = VECTOR_BYTES // A.itemsize
    width = slice_width(dim, slices, lanes)
    # One row per state: the row of A and the running state.
    rows = np.empty(2 * states * lanes, A.dtype)
    for task in range(first, last):
        b = task // slices
        start = task % slices * width
        stop = min(start + width, dim)
        for k in range(groups):
            walk = order[k if order.shape[0] > 1 else 0]
            added_up = k > 0 and out_strides[2] == 0
            for c in range(start, stop, lanes):
                count = stop - c
                bias, skip = load(delta_bias, k * dim + c, count), load(D, k * dim + c, count)
                row_x = b * x_strides[0] + k * x_strides[2] + c
                row_delta = b * delta_strides[0] + k * delta_strides[2] + c
                row_z = b * z_strides[0] + k * z_strides[2] + c
                row_out = b * out_strides[0] + k * out_strides[2] + c
                row_B = b * B_strides[0] + k * B_strides[2]
                row_C = b * C_strides[0] + k * C_strides[2]
                last_row = (b * groups + k) * states * dim + c
                A_row, h = load(A, k * states * dim + c, count), broadcast(A.dtype.type(0))
                for n in range(states):
                    store(rows, 2 * n * lanes, load(A, (k * states + n) * dim + c, count), lanes)
                    store(rows, (2 * n + 1) * lanes, h, lanes)
                for t in range(length):
                    p = walk[t]
                    dt = step_size(delta, row_delta + p * delta_strides[1], bias, delta_softplus, count)
                    value = load(x, row_x + p * x_strides[1], count)
                    added = dt * value
                    y = skip * value
                    at_B, at_C = row_B + p * B_strides[1], row_C + p * C_strides[1]
                    if states == 1:
                        # VMamba's case: the only state stays in a register.
                        h = exp(dt * A_row) * h + added * B[at_B]
                        y = y + h * C[at_C]
                    else:
                        for n in range(states):
                            A_n = load(rows, 2 * n * lanes, lanes)
                            h_n = load(rows, (2 * n + 1) * lanes, lanes)
                            h_n = exp(dt * A_n) * h_n + added * B[at_B + n * B_strides[3]]
                            store(rows, (2 * n + 1) * lanes, h_n, lanes)
                            y = y + h_n * C[at_C + n * C_strides[3]]
                    if z.size > 0:
                        gate = load(z, row_z + p * z_strides[1], count)
                        y = y * (gate * sigmoid(gate))
                    at_out = row_out + p * out_strides[1]
                    if added_up:
                        y = y + load(out, at_out, count)
                    store(out, at_out, y, count)
                if states == 1:
                    store(state, last_row, h, count)
                else:
                    for n in range(states):
                        store(state, last_row + n * dim, load(rows, (2 * n + 1) * lanes, lanes), count)


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
