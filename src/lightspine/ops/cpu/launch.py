"""The grouped scan on a CPU, by the compiled kernels: memory in, memory out.

A scan has K groups of D channels. Every tensor is handed over with the strides at which a position, a group
and a state follow each other, so that tokens, maps and slices of a projection are read where they lie. Two
strides are particular:

- Groups may share memory: with a group stride of 0 all read the same x, or add to the same output.
- `order` says which position each step visits: a direction costs no copy.

The functions here make no view and no copy that they do not need: for a small scan they cost as much as the
kernel.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspine.ops.cpu.config import PROJECTED_STEPS, chunk_length, saved_states_shape
from lightspine.ops.cpu.kernels import backward_on_openmp, backward_tasks, forward_on_openmp, forward_tasks
from lightspine.ops.cpu.parallel import run_tasks
from lightspine.ops.cpu.simd import VECTOR_BYTES

# Below this many states to compute, waking a second thread costs more than it saves.
_STATES_WORTH_A_THREAD = 32_768


# The kernels tell the two 16-bit formats apart by the sign of the integers that carry them.
_CARRIERS = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.float16: np.uint16,
}


@functools.lru_cache(maxsize=64)
def type_examples(*dtypes: torch.dtype) -> tuple[np.ndarray, ...]:
    """Return an empty array for each dtype, by whose type a kernel is compiled."""
    return tuple(np.empty(0, _CARRIERS[dtype]) for dtype in dtypes)


class Strided(NamedTuple):
    """A tensor seen as (B, L, K, X), whatever its own axes: no view of it has to be made.

    Attributes:
        tensor: the memory; index 0 on every axis is where it begins.
        batch: stride of B in elements.
        position: stride of L.
        group: stride of K; 0 where all groups share.
        last: stride of X.
    """

    tensor: Tensor
    batch: int
    position: int
    group: int
    last: int = 1


def readable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `t` itself where a kernel whose states have `dtype` can read its last axis, else a copy.

    The last axis has to be adjacent in memory. Every dtype is read as it is, but 64 bits only beside 64 bits.
    """
    if (t.dtype == torch.float64) != (dtype == torch.float64):
        t = t.to(dtype)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def table_of(numbers: Sequence[int], entries: Sequence[Strided | Tensor | None]) -> np.ndarray:
    """Return the table: the numbers, then address and strides of each entry.

    A `Strided` takes five places, as does `None` in its stead; a tensor takes its address only and has to be
    contiguous. The caller keeps the tensors alive.
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


class GroupedInputs(NamedTuple):
    """The tensors of a grouped scan and the order of its walk.

    Attributes:
        sizes: B, L, K, D of a group, N.
        dtype: in which states are computed: float32, or float64 for float64 input.
        x: input, (B, L, K, D), channels adjacent.
        delta: steps before bias and softplus, (B, L, K, D), channels adjacent.
        A: state matrices, (K, D, N).
        B: input projections, (B, L, K, N), of the dtype above.
        C: output projections, (B, L, K, N), of the dtype above.
        D: skips, (K, D).
        z: gate, (B, L, K, D), channels adjacent.
        delta_bias: added to delta, (K, D).
        delta_softplus: pass the steps through softplus.
        order: position that each step visits, int64 (1, L) for all groups or (K, L).
        step_weight: forward only: `delta` has R numbers in place of D, (B, L, K, R) of the dtype above, which
            this maps to the steps; (K, R, D), contiguous and of the dtype above.
    """

    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype
    x: Strided
    delta: Strided
    A: Tensor
    B: Strided
    C: Strided
    D: Tensor | None
    z: Strided | None
    delta_bias: Tensor | None
    delta_softplus: bool
    order: np.ndarray
    step_weight: Tensor | None = None


class ParameterGradients(NamedTuple):
    """Gradients of what all images share, and of the projections, in the dtype of the state.

    Attributes:
        A: (K, D, N).
        B: (B, L, K, N).
        C: (B, L, K, N).
        D: (K, D).
        delta_bias: (K, D).
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor


def grouped_scan(inputs: GroupedInputs, out: Strided, keep: bool) -> tuple[Tensor, Tensor]:
    """Write the output and return the last state and what the backward wants to know again.

    Args:
        inputs: the tensors of the scan.
        out: (B, L, K, D), channels adjacent; with a group stride of 0 the groups are added up.
        keep: note states on the way, for a backward of the same inputs.

    Returns:
        The last state, (B, K, N, D), and the saved states, of `config.saved_states_shape`; both in the dtype
        in which states are computed.
    """
    batch, length, groups, dim, states = inputs.sizes
    state = torch.empty(batch, groups, states, dim, dtype=inputs.dtype)
    kept = torch.empty(saved_states_shape(*inputs.sizes) if keep else (0,), dtype=inputs.dtype)
    slices, threads = _split(inputs)
    chunk = length
    if kept.numel():
        chunk = chunk_length(length, states)
    elif inputs.step_weight is not None:
        chunk = min(length, PROJECTED_STEPS)
    operands = _operands(inputs)
    table = table_of(_numbers(inputs, slices, chunk), (*operands, out, state, kept))
    z = inputs.z or inputs.x
    types = type_examples(
        inputs.x.tensor.dtype, inputs.delta.tensor.dtype, inputs.dtype, z.tensor.dtype, out.tensor.dtype
    )
    run_tasks(forward_tasks, forward_on_openmp, batch * slices, threads, table, types, inputs.order)
    return state, kept


def grouped_scan_backward(
    grad_out: Strided,
    grad_state: Tensor | None,
    inputs: GroupedInputs,
    kept: Tensor,
    grad_x: Strided,
    grad_delta: Strided,
    grad_z: Strided | None,
) -> ParameterGradients:
    """Write the gradients of x, delta and z, and return all others.

    Args:
        grad_out: gradient of the output, (B, L, K, D), channels adjacent; a group stride of 0 where the
            groups were added up.
        grad_state: gradient of the last state, (B, K, N, D), contiguous, of the state's dtype; `None` for
            zero.
        inputs: as in the forward.
        kept: what the forward noted, or a tensor of size 0 to do without.
        grad_x: (B, L, K, D), channels adjacent; with a group stride of 0 the groups are added up.
        grad_delta: (B, L, K, D), channels adjacent.
        grad_z: (B, L, K, D), channels adjacent.
    """
    batch, length, groups, dim, states = inputs.sizes
    slices, threads = _split(inputs)
    if grad_state is None:
        grad_state = torch.zeros(batch, groups, states, dim, dtype=inputs.dtype)
    grad_B = torch.zeros(slices, batch, length, groups, states, dtype=inputs.dtype)
    grad_C = torch.zeros_like(grad_B)
    parameters = torch.empty(batch, groups, states + 2, dim, dtype=inputs.dtype)
    flowing = (grad_out, grad_x, grad_delta, grad_z)
    operands = _operands(inputs)
    table = table_of(
        _numbers(inputs, slices, chunk_length(length, states)),
        (*operands, *flowing, grad_state, grad_B, grad_C, parameters, kept),
    )
    z = inputs.z or inputs.x
    types = type_examples(
        inputs.x.tensor.dtype,
        inputs.delta.tensor.dtype,
        inputs.dtype,
        z.tensor.dtype,
        grad_out.tensor.dtype,
        grad_x.tensor.dtype,
    )
    run_tasks(backward_tasks, backward_on_openmp, batch * slices, threads, table, types, inputs.order)
    return ParameterGradients(
        parameters[:, :, :states].sum(0).transpose(1, 2),
        grad_B[0] if slices == 1 else grad_B.sum(0),
        grad_C[0] if slices == 1 else grad_C.sum(0),
        parameters[:, :, states].sum(0),
        parameters[:, :, states + 1].sum(0),
    )


def _split(inputs: GroupedInputs) -> tuple[int, int]:
    """Return into how many slices the channels of an image are cut, and how many threads work."""
    batch, length, groups, dim, states = inputs.sizes
    work = batch * length * groups * dim * states
    threads = torch.get_num_threads() if work > _STATES_WORTH_A_THREAD else 1
    registers = -(-dim * inputs.dtype.itemsize // VECTOR_BYTES)
    slices = 1
    # Either an even share for every thread, or so many tasks that an uneven share does not matter.
    while slices < registers and batch * slices % threads and batch * slices < 4 * threads:
        slices += 1
    return slices, threads


def _numbers(inputs: GroupedInputs, slices: int, chunk: int) -> tuple[int, ...]:
    rank = 0 if inputs.step_weight is None else inputs.step_weight.shape[1]
    return *inputs.sizes, slices, chunk, int(inputs.delta_softplus), rank


def _operands(inputs: GroupedInputs) -> tuple[Strided | Tensor | None, ...]:
    """Return what the kernels read, A as (K, N, D), in the order of `kernels.Operands`."""
    dtype = inputs.dtype
    A = inputs.A.to(dtype)
    A = A.contiguous() if A.shape[2] == 1 else A.transpose(1, 2).contiguous()
    nothing = None
    if inputs.D is None or inputs.delta_bias is None:
        nothing = torch.zeros(A.shape[0], inputs.sizes[3], dtype=dtype)
    D, bias = (nothing if t is None else t.to(dtype).contiguous() for t in (inputs.D, inputs.delta_bias))
    # Where there is none, any address will do: it is not read.
    weight = A if inputs.step_weight is None else inputs.step_weight
    return inputs.x, inputs.delta, inputs.B, inputs.C, inputs.z, A, D, bias, weight
