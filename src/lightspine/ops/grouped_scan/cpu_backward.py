"""The backward scan as a compiled kernel: one register full of channels at a time.

Nothing is kept from the forward. A task computes the states of a chunk of the walk again, with the decays,
into a scratch of fixed size, and walks the chunk backwards with the adjoint of the state. A sequence longer
than one chunk is first walked forwards once, to find the state at the start of each chunk.

Names as in `cpu_forward`: b batch, k group, c first channel of the register, t step, p position, n state.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from lightspine.ops.grouped_scan.cpu_forward import slice_width, step_size
from lightspine.ops.grouped_scan.cpu_math import exp, sigmoid, softplus_slope
from lightspine.ops.grouped_scan.simd import VECTOR_BYTES, broadcast, load, store, total

# Scratch of one task. It stays in the second-level cache of current machines, and holds all of Vim's 197
# tokens.
SCRATCH_BYTES = 512 * 1024
# Vectors per step beside those of the states: step, slope of the softplus, input, gradient of the output.
_STEP_ROWS = 4


class _Scratch(NamedTuple):
    """Vectors of one task, flat.

    Attributes:
        starts: state at the start of each chunk, (chunks, N).
        decays: decay of each step of the chunk, (T, N).
        history: states of the chunk, from the one before its first step on, (T + 1, N).
        steps: the _STEP_ROWS vectors of each step of the chunk.
        rows: per state the row of A, what the adjoint brings from the right, and the gradient of A.
    """

    starts: Any
    decays: Any
    history: Any
    steps: Any
    rows: Any


class _Sources(NamedTuple):
    """The flat inputs, each with where the channels stand at position 0, and the stride of positions."""

    x: Any
    x_at: int
    x_stride: int
    delta: Any
    delta_at: int
    delta_stride: int
    B: Any
    B_at: int
    B_stride: int
    B_state_stride: int
    C: Any
    C_at: int
    C_stride: int
    C_state_stride: int
    z: Any
    z_at: int
    z_stride: int
    grad_out: Any
    grad_out_at: int
    grad_out_stride: int


@njit(nogil=True, cache=True, error_model="numpy")
def backward_tasks(
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
    grad_out: Any,
    grad_out_strides: tuple[int, int, int],
    grad_state: Any,
    grad_x: Any,
    grad_x_strides: tuple[int, int, int],
    grad_delta: Any,
    grad_z: Any,
    grad_B: Any,
    grad_C: Any,
    grad_parameters: Any,
) -> None:
    """Compute the gradients of the tasks from `first` to before `last`; tasks as in `forward_tasks`.

    Args:
        first: first task.
        last: task after the last one.
        slices: slices per image.
        sizes: length L, groups K, channels D of a group, states N.
        x: as in `forward_tasks`, like all down to `delta_softplus`.
        x_strides: see x.
        delta: see x.
        delta_strides: see x.
        A: see x.
        B: see x.
        B_strides: see x.
        C: see x.
        C_strides: see x.
        D: see x.
        delta_bias: see x.
        z: see x.
        z_strides: see x.
        order: see x.
        delta_softplus: see x.
        grad_out: gradient of the output.
        grad_out_strides: its strides; a group stride of 0 where the groups were added up.
        grad_state: gradient of the last state, (B, K, N, D).
        grad_x: gradient of x.
        grad_x_strides: its strides; with a group stride of 0 the groups are added up.
        grad_delta: gradient of delta, (B, L, K, D).
        grad_z: gradient of z, (B, L, K, D), or of size 0.
        grad_B: gradient of B, zeros on entry, one per slice: (slices, B, L, K, N).
        grad_C: gradient of C, likewise.
        grad_parameters: gradients of A, D and delta_bias, one per image: (B, K, N + 2, D).
    """
    length, groups, dim, states = sizes
    lanes = VECTOR_BYTES // A.itemsize
    width = slice_width(dim, slices, lanes)
    batch = grad_delta.size // (length * groups * dim)
    chunk = chunk_length(length, states)
    chunks = (length + chunk - 1) // chunk
    per_step = states * lanes
    scratch = _Scratch(
        np.empty(chunks * per_step, A.dtype),
        np.empty(chunk * per_step, A.dtype),
        np.empty((chunk + 1) * per_step, A.dtype),
        np.empty(chunk * _STEP_ROWS * lanes, A.dtype),
        np.empty(3 * per_step, A.dtype),
    )
    rows = scratch.rows
    zero = broadcast(A.dtype.type(0))

    for task in range(first, last):
        b, s = task // slices, task % slices
        stop = min((s + 1) * width, dim)
        for k in range(groups):
            walk = order[k if order.shape[0] > 1 else 0]
            added_up = k > 0 and grad_x_strides[2] == 0
            for c in range(s * width, stop, lanes):
                count = stop - c
                bias, skip = load(delta_bias, k * dim + c, count), load(D, k * dim + c, count)
                sources = _Sources(
                    x,
                    b * x_strides[0] + k * x_strides[2] + c,
                    x_strides[1],
                    delta,
                    b * delta_strides[0] + k * delta_strides[2] + c,
                    delta_strides[1],
                    B,
                    b * B_strides[0] + k * B_strides[2],
                    B_strides[1],
                    B_strides[3],
                    C,
                    b * C_strides[0] + k * C_strides[2],
                    C_strides[1],
                    C_strides[3],
                    z,
                    b * z_strides[0] + k * z_strides[2] + c,
                    z_strides[1],
                    grad_out,
                    b * grad_out_strides[0] + k * grad_out_strides[2] + c,
                    grad_out_strides[1],
                )
                for n in range(states):
                    row = 3 * n * lanes
                    store(rows, row, load(A, (k * states + n) * dim + c, count), lanes)
                    flow = load(grad_state, ((b * groups + k) * states + n) * dim + c, count)
                    store(rows, row + lanes, flow, lanes)
                    store(rows, row + 2 * lanes, zero, lanes)
                    store(scratch.starts, n * lanes, zero, lanes)
                grad_D, grad_bias = zero, zero
                row_grad_x = b * grad_x_strides[0] + k * grad_x_strides[2] + c
                row_grad = (b * length * groups + k) * dim + c
                row_grad_B = (((s * batch + b) * length) * groups + k) * states

                _find_starts(scratch, sources, walk, chunk, chunks, states, bias, delta_softplus, count)
                for j in range(chunks - 1, -1, -1):
                    part = walk[j * chunk : (j + 1) * chunk]
                    for n in range(states):
                        at = n * lanes
                        store(scratch.history, at, load(scratch.starts, j * per_step + at, lanes), lanes)
                    _replay(
                        scratch,
                        sources,
                        part,
                        states,
                        bias,
                        skip,
                        delta_softplus,
                        count,
                        grad_z,
                        row_grad,
                        groups * dim,
                    )
                    for i in range(part.size - 1, -1, -1):
                        p = part[i]
                        value, grad_y, by_input, by_decay = _adjoint_step(
                            scratch, sources, i, p, states, grad_B, grad_C, row_grad_B + p * groups * states
                        )
                        at = i * _STEP_ROWS * lanes
                        grad_value = by_input * load(scratch.steps, at, lanes) + skip * grad_y
                        grad_raw = (by_input * value + by_decay) * load(scratch.steps, at + lanes, lanes)
                        grad_D = grad_D + grad_y * value
                        grad_bias = grad_bias + grad_raw
                        store(grad_delta, row_grad + p * groups * dim, grad_raw, count)
                        at = row_grad_x + p * grad_x_strides[1]
                        if added_up:
                            grad_value = grad_value + load(grad_x, at, count)
                        store(grad_x, at, grad_value, count)

                at = (b * groups + k) * (states + 2) * dim + c
                for n in range(states):
                    store(grad_parameters, at + n * dim, load(rows, (3 * n + 2) * lanes, lanes), count)
                store(grad_parameters, at + states * dim, grad_D, count)
                store(grad_parameters, at + (states + 1) * dim, grad_bias, count)


@njit(forceinline=True)
def _find_starts(
    scratch: _Scratch,
    sources: _Sources,
    walk: Any,
    chunk: int,
    chunks: int,
    states: int,
    bias: Any,
    delta_softplus: bool,
    count: int,
) -> None:
    """Walk all chunks but the last and note the state at the start of each."""
    lanes = VECTOR_BYTES // scratch.rows.itemsize
    state = scratch.history
    for n in range(states):
        store(state, n * lanes, broadcast(state.dtype.type(0)), lanes)
    for t in range((chunks - 1) * chunk):
        p = walk[t]
        dt = step_size(
            sources.delta, sources.delta_at + p * sources.delta_stride, bias, delta_softplus, count
        )
        added = dt * load(sources.x, sources.x_at + p * sources.x_stride, count)
        at_B = sources.B_at + p * sources.B_stride
        boundary = (t + 1) % chunk == 0
        for n in range(states):
            at = n * lanes
            h = exp(dt * load(scratch.rows, 3 * at, lanes)) * load(state, at, lanes)
            h = h + added * sources.B[at_B + n * sources.B_state_stride]
            store(state, at, h, lanes)
            if boundary:
                store(scratch.starts, (t + 1) // chunk * states * lanes + at, h, lanes)


@njit(forceinline=True)
def _replay(
    scratch: _Scratch,
    sources: _Sources,
    part: Any,
    states: int,
    bias: Any,
    skip: Any,
    delta_softplus: bool,
    count: int,
    grad_z: Any,
    grad_z_at: int,
    grad_z_stride: int,
) -> None:
    """Compute again the states and decays of a chunk and what its steps take in; write the gradient of z."""
    lanes = VECTOR_BYTES // scratch.rows.itemsize
    gated = sources.z.size > 0
    for i in range(part.size):
        p = part[i]
        at_delta = sources.delta_at + p * sources.delta_stride
        dt = step_size(sources.delta, at_delta, bias, delta_softplus, count)
        slope = broadcast(scratch.rows.dtype.type(1))
        if delta_softplus:
            slope = softplus_slope(load(sources.delta, at_delta, count) + bias)
        value = load(sources.x, sources.x_at + p * sources.x_stride, count)
        added, y = dt * value, skip * value
        at_B, at_C = sources.B_at + p * sources.B_stride, sources.C_at + p * sources.C_stride
        for n in range(states):
            at = (i * states + n) * lanes
            decay = exp(dt * load(scratch.rows, 3 * n * lanes, lanes))
            h = (
                decay * load(scratch.history, at, lanes)
                + added * sources.B[at_B + n * sources.B_state_stride]
            )
            store(scratch.decays, at, decay, lanes)
            store(scratch.history, at + states * lanes, h, lanes)
            if gated:
                y = y + h * sources.C[at_C + n * sources.C_state_stride]
        grad_y = load(sources.grad_out, sources.grad_out_at + p * sources.grad_out_stride, count)
        if gated:
            gate = load(sources.z, sources.z_at + p * sources.z_stride, count)
            opening = sigmoid(gate)
            by_gate = grad_y * y * opening * (1.0 + gate * (1.0 - opening))
            store(grad_z, grad_z_at + p * grad_z_stride, by_gate, count)
            grad_y = grad_y * (gate * opening)
        at = i * _STEP_ROWS * lanes
        store(scratch.steps, at, dt, lanes)
        store(scratch.steps, at + lanes, slope, lanes)
        store(scratch.steps, at + 2 * lanes, value, lanes)
        store(scratch.steps, at + 3 * lanes, grad_y, lanes)


@njit(forceinline=True)
def _adjoint_step(
    scratch: _Scratch, sources: _Sources, i: int, p: int, states: int, grad_B: Any, grad_C: Any, at_grad: int
) -> tuple[Any, Any, Any, Any]:
    """Take the adjoint of the state over one step, and add this step to the gradients of A, B and C.

    Returns:
        The input, the gradient of the ungated output, and what reaches the step's product with the input and
        its decay.
    """
    lanes = VECTOR_BYTES // scratch.rows.itemsize
    at = i * _STEP_ROWS * lanes
    dt, value = load(scratch.steps, at, lanes), load(scratch.steps, at + 2 * lanes, lanes)
    grad_y = load(scratch.steps, at + 3 * lanes, lanes)
    added = dt * value
    by_input = by_decay = broadcast(scratch.rows.dtype.type(0))
    at_B, at_C = sources.B_at + p * sources.B_stride, sources.C_at + p * sources.C_stride
    for n in range(states):
        row, at = 3 * n * lanes, (i * states + n) * lanes
        flow = load(scratch.rows, row + lanes, lanes)
        adjoint = grad_y * sources.C[at_C + n * sources.C_state_stride] + flow
        grad_B[at_grad + n] += total(adjoint * added)
        grad_C[at_grad + n] += total(grad_y * load(scratch.history, at + states * lanes, lanes))
        flow = adjoint * load(scratch.decays, at, lanes)
        store(scratch.rows, row + lanes, flow, lanes)
        through = flow * load(scratch.history, at, lanes)
        store(scratch.rows, row + 2 * lanes, load(scratch.rows, row + 2 * lanes, lanes) + through * dt, lanes)
        by_input = by_input + adjoint * sources.B[at_B + n * sources.B_state_stride]
        by_decay = by_decay + through * load(scratch.rows, row, lanes)
    return value, grad_y, by_input, by_decay


@njit
def chunk_length(length: int, states: int) -> int:
    """Return how many steps of the walk fit into the scratch."""
    fitting = SCRATCH_BYTES // VECTOR_BYTES // (2 * states + _STEP_ROWS)
    chunks = (length + max(fitting, 8) - 1) // max(fitting, 8)
    return (length + chunks - 1) // chunks
