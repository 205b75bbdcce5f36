"""Launch of the compiled CPU kernels: splits a grouped scan into tasks and passes tensors as addresses.

Passing an array per tensor costs microseconds each, as much as a small scan takes. The kernels therefore
receive one table of integers with sizes, addresses and strides. It does not contain dtypes: a kernel is
compiled for the dtypes of the empty arrays that are passed with it.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightspine.ops.cpu.config import PROJECTED_POSITIONS, chunk_length, saved_states_shape
from lightspine.ops.cpu.kernels import backward_on_openmp, backward_tasks, forward_on_openmp, forward_tasks
from lightspine.ops.cpu.parallel import run_tasks
from lightspine.ops.cpu.simd import VECTOR_BYTES
from lightspine.ops.inputs import GroupedInputs, ParameterGradients, Strided

# They transpose sequences (B, D, L) in blocks.
READS_SEQUENCES = True
# Below this many state updates, waking a second thread costs more than it saves.
_UPDATES_WORTH_A_THREAD = 32_768
# numba has no 16-bit floats: the kernels tell the two formats apart by the sign of the integers.
_NUMPY_DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.float16: np.uint16,
}


def grouped_scan(inputs: GroupedInputs, out: Strided, save_states: bool) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        inputs: the tensors of the scan.
        out: receives the output, (B, L, K, D), channels or positions contiguous; with a group stride of 0
            the groups are summed.
        save_states: save the states that the backward of the same inputs starts its chunks from.

    Returns:
        The last state, (B, K, N, D), and the saved states, of `config.saved_states_shape` or empty; both in
        the dtype of the state.
    """
    batch, length, groups, dim, states = inputs.sizes
    state = torch.empty(batch, groups, states, dim, dtype=inputs.dtype)
    saved_states = torch.empty(saved_states_shape(*inputs.sizes) if save_states else (0,), dtype=inputs.dtype)
    slices, threads = _split(inputs)
    chunk = length
    if saved_states.numel():
        chunk = chunk_length(length, states)
    elif inputs.dt_weight is not None:
        chunk = min(length, PROJECTED_POSITIONS)
    operands = _operands(inputs)
    table = _table(_numbers(inputs, slices, chunk), (*operands, out, state, saved_states))
    z = inputs.z or inputs.x
    types = _type_examples(
        inputs.x.tensor.dtype, inputs.delta.tensor.dtype, inputs.dtype, z.tensor.dtype, out.tensor.dtype
    )
    run_tasks(forward_tasks, forward_on_openmp, batch * slices, threads, table, types, _order(inputs))
    return state, saved_states


def grouped_scan_backward(
    grad_out: Strided,
    grad_state: Tensor | None,
    inputs: GroupedInputs,
    saved_states: Tensor,
    grad_x: Strided,
    grad_delta: Strided,
    grad_z: Strided | None,
) -> ParameterGradients:
    """Run the backward kernel: write the gradients of x, delta and z and return all others.

    Args:
        grad_out: gradient of the output, (B, L, K, D), channels contiguous; a group stride of 0 where the
            groups were summed.
        grad_state: gradient of the last state, (B, K, N, D), contiguous, of the state's dtype; `None` for
            zero.
        inputs: as in the forward.
        saved_states: from the forward, or empty to recompute them.
        grad_x: receives (B, L, K, D), channels contiguous; with a group stride of 0 the groups are summed.
        grad_delta: receives (B, L, K, D), channels contiguous.
        grad_z: receives (B, L, K, D), channels contiguous.
    """
    batch, length, groups, dim, states = inputs.sizes
    slices, threads = _split(inputs)
    if grad_state is None:
        grad_state = torch.zeros(batch, groups, states, dim, dtype=inputs.dtype)
    grad_B = torch.zeros(slices, batch, length, groups, states, dtype=inputs.dtype)
    grad_C = torch.zeros_like(grad_B)
    parameters = torch.empty(batch, groups, states + 2, dim, dtype=inputs.dtype)
    operands = _operands(inputs)
    table = _table(
        _numbers(inputs, slices, chunk_length(length, states)),
        (
            *operands,
            grad_out,
            grad_x,
            grad_delta,
            grad_z,
            grad_state,
            grad_B,
            grad_C,
            parameters,
            saved_states,
        ),
    )
    z = inputs.z or inputs.x
    types = _type_examples(
        inputs.x.tensor.dtype,
        inputs.delta.tensor.dtype,
        inputs.dtype,
        z.tensor.dtype,
        grad_out.tensor.dtype,
        grad_x.tensor.dtype,
    )
    run_tasks(backward_tasks, backward_on_openmp, batch * slices, threads, table, types, _order(inputs))
    return ParameterGradients(
        parameters[:, :, :states].sum(0).transpose(1, 2),
        grad_B[0] if slices == 1 else grad_B.sum(0),
        grad_C[0] if slices == 1 else grad_C.sum(0),
        None if inputs.D is None else parameters[:, :, states].sum(0),
        None if inputs.delta_bias is None else parameters[:, :, states + 1].sum(0),
    )


def _split(inputs: GroupedInputs) -> tuple[int, int]:
    """Return the number of slices that the channels of an image are cut into, and of threads."""
    batch, length, groups, dim, states = inputs.sizes
    updates = batch * length * groups * dim * states
    threads = torch.get_num_threads() if updates > _UPDATES_WORTH_A_THREAD else 1
    registers = -(-dim * inputs.dtype.itemsize // VECTOR_BYTES)
    slices = 1
    # Either an even share for every thread, or so many tasks that an uneven share does not matter.
    while slices < registers and batch * slices % threads and batch * slices < 4 * threads:
        slices += 1
    return slices, threads


def _numbers(inputs: GroupedInputs, slices: int, chunk: int) -> tuple[int, ...]:
    rank = 0 if inputs.dt_weight is None else inputs.dt_weight.shape[1]
    return *inputs.sizes, slices, chunk, int(inputs.delta_softplus), rank


def _operands(inputs: GroupedInputs) -> tuple[Strided | Tensor | None, ...]:
    """Return what the kernels read, A as (K, N, D), in the order of `kernels.Operands`."""
    dtype = inputs.dtype
    groups, dim, states = inputs.sizes[2:]
    A = inputs.A.to(dtype)
    A = A.contiguous() if states == 1 else A.view(groups, dim, states).transpose(1, 2).contiguous()
    zeros = None
    if inputs.D is None or inputs.delta_bias is None:
        zeros = torch.zeros(groups, dim, dtype=dtype)
    D, bias = (zeros if t is None else t.to(dtype).contiguous() for t in (inputs.D, inputs.delta_bias))
    # Without a weight, any address is valid: the kernel does not read it.
    weight = A if inputs.dt_weight is None else inputs.dt_weight
    B, C = _readable_projection(inputs.B, inputs), _readable_projection(inputs.C, inputs)
    return inputs.x, inputs.delta, B, C, inputs.z, A, D, bias, weight


def _readable_projection(projection: Strided, inputs: GroupedInputs) -> Strided:
    """Return B or C, copied where its dtype is not that of the state, or where positions are innermost.

    Every register of channels reads it again, and states that lie far apart share no cache line.
    """
    t = projection.tensor
    batch, length, groups, _, states = inputs.sizes
    if t.dtype == inputs.dtype and (projection.position != 1 or states == 1):
        return projection
    view = t.as_strided((batch, length, groups, states), projection[1:], t.storage_offset())
    copy = view.to(inputs.dtype, memory_format=torch.contiguous_format)
    return Strided(copy, *copy.stride())


def _order(inputs: GroupedInputs) -> np.ndarray:
    """Return the positions in scan order, (K, L), or (1, L) for all groups."""
    if inputs.order is not None:
        return inputs.order.numpy()
    return _sequence_order(inputs.sizes[1], inputs.reversed_groups != 0)


@functools.lru_cache(maxsize=64)
def _sequence_order(length: int, reverse: bool) -> np.ndarray:
    positions = np.arange(length)
    return np.ascontiguousarray(positions[::-1] if reverse else positions)[None]


@functools.lru_cache(maxsize=64)
def _type_examples(*dtypes: torch.dtype) -> tuple[np.ndarray, ...]:
    """Return an empty array for each dtype; a kernel is compiled for their types."""
    return tuple(np.empty(0, _NUMPY_DTYPES[dtype]) for dtype in dtypes)


def _table(numbers: Sequence[int], entries: Sequence[Strided | Tensor | None]) -> np.ndarray:
    """Return the table of a kernel: the numbers, then the address and strides of each entry.

    A `Strided` takes five places, as does `None` in place of one; a tensor takes one, its address, and must
    be contiguous. The caller keeps the tensors alive.
    """
    table = list(numbers)
    for entry in entries:
        if entry is None:
            table += (0, 0, 0, 0, 0)
        elif isinstance(entry, Strided):
            tensor, *strides = entry
            table.append(tensor.data_ptr())
            table += strides
        else:
            table.append(entry.data_ptr())
    return np.array(table, np.int64)
