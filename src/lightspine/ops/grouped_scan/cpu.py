"""The grouped scan on a CPU, by the compiled kernels: tensors in, tensors out.

Shapes as in `torch_blocked`: x and delta (B, L, K, D), A (K, D, N), B and C (B, L, K, N). Three things are
particular:

- Groups may share memory: `x` and `out` may be `expand`ed over K. The outputs of the groups, and their
gradients of x,
  are then added up while they are written.
- `order` says which position each step visits, so that a direction costs no copy.
- What the kernels can read where it lies is neither copied nor converted: any dtype, any strides but the
channels'.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspine.ops.grouped_scan.cpu_arguments import table_of, type_examples
from lightspine.ops.grouped_scan.cpu_backward import backward_on_team, backward_tasks
from lightspine.ops.grouped_scan.cpu_chunks import chunk_length, kept_shape
from lightspine.ops.grouped_scan.cpu_forward import forward_on_team, forward_tasks
from lightspine.ops.grouped_scan.cpu_threads import run_tasks
from lightspine.ops.grouped_scan.simd import VECTOR_BYTES
from lightspine.ops.grouped_scan.torch_blocked import GroupedGradients

# Below this many states to compute, waking a second thread costs more than it saves.
_STATES_WORTH_A_THREAD = 32_768


class GroupedInputs(NamedTuple):
    """The tensors of a grouped scan and the order of its walk.

    Attributes:
        x: input, (B, L, K, D).
        delta: steps before bias and softplus, (B, L, K, D).
        A: state matrices, (K, D, N).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        D: skips, (K, D).
        z: gate, (B, L, K, D).
        delta_bias: added to delta, (K, D).
        delta_softplus: pass the steps through softplus.
        order: position that each step visits, int64 (1, L) for all groups or (K, L).
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    order: np.ndarray


def grouped_scan(inputs: GroupedInputs, out: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Write the output into `out` and return the last state and what the backward wants to know again.

    Args:
        inputs: the tensors of the scan.
        out: (B, L, K, D), channels next to each other; where it is expanded over K, the groups are added up.
        keep: note states on the way, for a backward of the same inputs.

    Returns:
        The last state, (B, K, D, N), and the noted states, of `cpu_chunks.kept_shape`; both in the dtype in
        which states are computed.
    """
    inputs = _readable(inputs)
    dtype = inputs.A.dtype
    batch, length, groups, dim = inputs.x.shape
    states = inputs.A.shape[1]
    state = torch.empty(batch, groups, states, dim, dtype=dtype)
    kept = torch.empty(kept_shape(batch, length, groups, dim, states) if keep else (0,), dtype=dtype)
    slices, threads = _split(inputs)
    chunk = chunk_length(length, states) if kept.numel() else length
    table = table_of(
        _numbers(inputs, slices, chunk), (*_operands(inputs), out, state.flatten(), kept.flatten())
    )
    z = inputs.x if inputs.z is None else inputs.z
    types = type_examples(inputs.x.dtype, inputs.delta.dtype, dtype, z.dtype, out.dtype)
    run_tasks(forward_tasks, forward_on_team, batch * slices, threads, table, types, inputs.order)
    return state.transpose(2, 3), kept


def grouped_scan_backward(
    grad_out: Tensor, grad_state: Tensor, inputs: GroupedInputs, kept: Tensor, grad_x: Tensor
) -> tuple[GroupedGradients, Tensor | None]:
    """Write the gradient of x into `grad_x` and return all gradients.

    Args:
        grad_out: gradient of the output, (B, L, K, D), expanded over K where the groups were added up.
        grad_state: gradient of the last state, (B, K, D, N).
        inputs: as in the forward.
        kept: what the forward noted, or a tensor of size 0 to do without.
        grad_x: (B, L, K, D), channels next to each other; where it is expanded over K, the groups are added
            up.

    Returns:
        The gradients, those of delta in its own dtype, those of A, B, C, D and delta_bias in the dtype of the
        state; and the gradient of z in its own dtype.
    """
    read = _readable(inputs)
    dtype = read.A.dtype
    batch, length, groups, dim = read.x.shape
    states = read.A.shape[1]
    slices, threads = _split(read)
    grad_out = _adjacent(grad_out, dtype)
    grad_delta = torch.empty(read.delta.shape, dtype=read.delta.dtype)
    grad_z = None if read.z is None else torch.empty(read.z.shape, dtype=read.z.dtype)
    grad_state = grad_state.to(dtype).transpose(2, 3).contiguous()
    grad_B, grad_C = torch.zeros(2, slices, batch, length, groups, states, dtype=dtype)
    parameters = torch.empty(batch, groups, states + 2, dim, dtype=dtype)
    whole = (grad_state.view(-1), grad_B.view(-1), grad_C.view(-1), parameters.view(-1), kept.view(-1))
    table = table_of(
        _numbers(read, slices, chunk_length(length, states)),
        (*_operands(read), grad_out, grad_x, grad_delta, grad_z, *whole),
    )
    z = read.x if read.z is None else read.z
    types = type_examples(read.x.dtype, read.delta.dtype, dtype, z.dtype, grad_out.dtype, grad_x.dtype)
    run_tasks(backward_tasks, backward_on_team, batch * slices, threads, table, types, read.order)
    grads = GroupedGradients(
        grad_x,
        grad_delta,
        parameters[:, :, :states].sum(0).transpose(1, 2),
        grad_B.sum(0),
        grad_C.sum(0),
        None if inputs.D is None else parameters[:, :, states].sum(0),
        None if inputs.delta_bias is None else parameters[:, :, states + 1].sum(0),
    )
    return grads, grad_z


def _readable(inputs: GroupedInputs) -> GroupedInputs:
    """Return the inputs as the kernels read them; what they can read where it lies stays there.

    A becomes (K, N, D); A, B, C, D and delta_bias are of the state's dtype, D and delta_bias never `None`.
    """
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    nothing = torch.zeros(inputs.A.shape[:2], dtype=dtype)
    return GroupedInputs(
        _adjacent(inputs.x, dtype),
        _adjacent(inputs.delta, dtype),
        inputs.A.to(dtype).transpose(1, 2).contiguous(),
        inputs.B.to(dtype),
        inputs.C.to(dtype),
        nothing if inputs.D is None else inputs.D.to(dtype).contiguous(),
        None if inputs.z is None else _adjacent(inputs.z, dtype),
        nothing if inputs.delta_bias is None else inputs.delta_bias.to(dtype).contiguous(),
        inputs.delta_softplus,
        inputs.order,
    )


def _adjacent(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `t` itself where the kernels can read it: channels adjacent, 64-bit beside 64-bit only."""
    if (t.dtype == torch.float64) != (dtype == torch.float64):
        t = t.to(dtype)
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _split(inputs: GroupedInputs) -> tuple[int, int]:
    """Return into how many slices the channels of an image are cut, and how many threads work."""
    batch, length, groups, dim = inputs.x.shape
    work = batch * length * groups * dim * inputs.A.shape[1]
    threads = torch.get_num_threads() if work > _STATES_WORTH_A_THREAD else 1
    registers = -(-dim * inputs.A.itemsize // VECTOR_BYTES)
    slices = 1
    # Either an even share for every thread, or so many tasks that an uneven share does not matter.
    while slices < registers and batch * slices % threads and batch * slices < 4 * threads:
        slices += 1
    return slices, threads


def _numbers(inputs: GroupedInputs, slices: int, chunk: int) -> tuple[int, ...]:
    batch, length, groups, dim = inputs.x.shape
    return batch, length, groups, dim, inputs.A.shape[1], slices, chunk, int(inputs.delta_softplus)


def _operands(inputs: GroupedInputs) -> tuple[Tensor | None, ...]:
    x, delta, A, B, C, D, z, delta_bias, _, _ = inputs
    return x, delta, B, C, z, A, D, delta_bias
