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

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightspine.ops.grouped_scan.cpu_backward import backward_tasks
from lightspine.ops.grouped_scan.cpu_forward import forward_tasks
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


def grouped_scan(inputs: GroupedInputs, out: Tensor) -> Tensor:
    """Write the output into `out` and return the last state.

    Args:
        inputs: the tensors of the scan.
        out: (B, L, K, D), channels next to each other; where it is expanded over K, the groups are added up.

    Returns:
        The last state, (B, K, D, N), in the dtype in which states are computed.
    """
    dtype = _state_dtype(inputs)
    batch, _, groups, dim = inputs.x.shape
    state = torch.empty(batch, groups, inputs.A.shape[2], dim, dtype=dtype)
    slices, threads = _split(inputs)
    run_tasks(
        forward_tasks, batch * slices, threads, slices, *_kernel_arguments(inputs), *_flat(out), _whole(state)
    )
    return state.transpose(2, 3)


def grouped_scan_backward(
    grad_out: Tensor, grad_state: Tensor, inputs: GroupedInputs, grad_x: Tensor
) -> tuple[GroupedGradients, Tensor | None]:
    """Write the gradient of x into `grad_x` and return all gradients.

    Args:
        grad_out: gradient of the output, (B, L, K, D), expanded over K where the groups were added up.
        grad_state: gradient of the last state, (B, K, D, N).
        inputs: as in the forward.
        grad_x: (B, L, K, D), channels next to each other; where it is expanded over K, the groups are added
            up.

    Returns:
        The gradients, those of delta in its own dtype, those of A, B, C, D and delta_bias in the dtype of the
        state; and the gradient of z in its own dtype.
    """
    dtype = _state_dtype(inputs)
    batch, length, groups, dim = inputs.x.shape
    states = inputs.A.shape[2]
    slices, threads = _split(inputs)
    grad_delta = torch.empty(inputs.delta.shape, dtype=inputs.delta.dtype)
    grad_z = None if inputs.z is None else torch.empty(inputs.z.shape, dtype=inputs.z.dtype)
    grad_B, grad_C = torch.zeros(2, slices, batch, length, groups, states, dtype=dtype)
    parameters = torch.empty(batch, groups, states + 2, dim, dtype=dtype)
    run_tasks(
        backward_tasks,
        batch * slices,
        threads,
        slices,
        *_kernel_arguments(inputs),
        *_flat(_readable(grad_out, dtype)),
        _whole(grad_state.to(dtype).transpose(2, 3).contiguous()),
        *_flat(grad_x),
        _whole(grad_delta),
        _whole(inputs.x.new_empty(0) if grad_z is None else grad_z),
        _whole(grad_B),
        _whole(grad_C),
        _whole(parameters),
    )
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


def _state_dtype(inputs: GroupedInputs) -> torch.dtype:
    return torch.promote_types(inputs.x.dtype, torch.float32)


def _split(inputs: GroupedInputs) -> tuple[int, int]:
    """Return into how many slices the channels of an image are cut, and how many threads work."""
    batch, length, groups, dim = inputs.x.shape
    work = batch * length * groups * dim * inputs.A.shape[2]
    threads = max(1, min(torch.get_num_threads(), work // _STATES_WORTH_A_THREAD))
    registers = -(-dim * _state_dtype(inputs).itemsize // VECTOR_BYTES)
    slices = 1
    # Either an even share for every thread, or so many tasks that an uneven share does not matter.
    while slices < registers and batch * slices % threads and batch * slices < 4 * threads:
        slices += 1
    return slices, threads


def _kernel_arguments(inputs: GroupedInputs) -> tuple[Any, ...]:
    dtype = _state_dtype(inputs)
    _, length, groups, dim = inputs.x.shape
    A = inputs.A.to(dtype).transpose(1, 2).contiguous()
    zeros = torch.zeros(groups, dim, dtype=dtype)
    gate = inputs.x.new_empty(0, 0, 0, 0) if inputs.z is None else _readable(inputs.z, dtype)
    return (
        (length, groups, dim, inputs.A.shape[2]),
        *_flat(_readable(inputs.x, dtype)),
        *_flat(_readable(inputs.delta, dtype)),
        _whole(A),
        *_flat(inputs.B.to(dtype), 4),
        *_flat(inputs.C.to(dtype), 4),
        _whole(zeros if inputs.D is None else inputs.D.to(dtype).contiguous()),
        _whole(zeros if inputs.delta_bias is None else inputs.delta_bias.to(dtype).contiguous()),
        *_flat(gate),
        inputs.order,
        inputs.delta_softplus,
    )


def _readable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `t` itself where the kernels can read it: channels adjacent, 64-bit beside 64-bit only."""
    if (t.dtype == torch.float64) != (dtype == torch.float64):
        t = t.to(dtype)
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _flat(t: Tensor, axes: int = 3) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the memory that `t` spans as a flat array, and the strides of the leading axes in elements."""
    span = (
        1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        if t.numel()
        else 0
    )
    return _array(t.detach().as_strided((span,), (1,))), t.stride()[:axes]


def _whole(t: Tensor) -> np.ndarray:
    return _array(t.detach().view(-1))


def _array(flat: Tensor) -> np.ndarray:
    # The kernels tell the two 16-bit formats apart by the sign of the integers that carry them.
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy()
    if flat.dtype == torch.float16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()
