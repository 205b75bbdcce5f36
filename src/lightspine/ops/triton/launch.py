"""Launch of the Triton kernels for a grouped scan.

Groups that share an output, as the directions of a cross scan do, are launched one after the other. Each adds
to what the last one wrote, so the result does not depend on timing.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from lightspine.errors import UsageError
from lightspine.ops.inputs import GroupedInputs, ParameterGradients, Strided
from lightspine.ops.triton.config import BOUNDARY_TILE, choose_blocks, programs_per_launch, scratch_size
from lightspine.ops.triton.kernels import (
    chunk_scan_bwd_kernel,
    chunk_scan_fwd_kernel,
    chunk_state_bwd_kernel,
    state_passing_kernel,
)


class _LaunchPlan:
    """Sizes, blocks and common kernel arguments of one scan."""

    def __init__(self, inputs: GroupedInputs, shared_output: bool, backward: bool) -> None:
        self.inputs, self.dtype = inputs, inputs.dtype
        self.batch, self.length, self.groups, self.dim, self.states = inputs.sizes
        # Groups that share an output are launched one by one.
        self.group_launches = [(k, 1) for k in range(self.groups)] if shared_output else [(0, self.groups)]
        rows = self.batch * self.group_launches[0][1]
        self.blocks = choose_blocks(
            self.length, self.dim, self.states, rows, self.dtype.itemsize, backward=backward
        )
        self.channel_blocks = -(-self.dim // self.blocks.channels)
        A = inputs.A.view(self.groups, self.dim, self.states)
        self.A = A.to(self.dtype).transpose(1, 2).contiguous()
        self.D, self.delta_bias = (
            None if t is None else t.to(self.dtype).contiguous() for t in (inputs.D, inputs.delta_bias)
        )

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.inputs.x.tensor.device)

    def programs(self, groups: int) -> int:
        return self.batch * groups * self.blocks.chunks * self.channel_blocks

    def scan_arguments(self) -> dict[str, Any]:
        """Arguments of every kernel that scans a sequence."""
        inputs = self.inputs
        return {
            "p_delta": inputs.delta.tensor,
            "p_A": self.A,
            "p_C": inputs.C.tensor,
            "p_bias": self.delta_bias,
            "p_z": None if inputs.z is None else inputs.z.tensor,
            "p_order": None if inputs.order is None else _on_device(inputs.order, self.A.device),
            "delta_strides": inputs.delta[1:],
            "C_strides": inputs.C[1:],
            "z_strides": (0, 0, 0, 0) if inputs.z is None else inputs.z[1:],
            "length": self.length,
            "groups": self.groups,
            "dim": self.dim,
            "states": self.states,
            "chunk": self.blocks.chunk,
            "chunks": self.blocks.chunks,
            "DELTA_SOFTPLUS": inputs.delta_softplus,
            "REVERSE": inputs.reverse,
            "BLOCK_D": self.blocks.channels,
            "BLOCK_N": self.blocks.states,
            "TILE": self.blocks.tile,
        }

    def state_arguments(self) -> dict[str, Any]:
        """Further arguments of the kernels that compute states."""
        return {
            "p_x": self.inputs.x.tensor,
            "p_B": self.inputs.B.tensor,
            "p_D": self.D,
            "x_strides": self.inputs.x[1:],
            "B_strides": self.inputs.B[1:],
        }


def grouped_scan(
    inputs: GroupedInputs,
    out: Strided,
    save_states: bool,  # noqa: ARG001 - the backward recomputes the states
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels.

    Args:
        inputs: the tensors of the scan.
        out: receives the output, (B, L, K, D), channels contiguous; with a group stride of 0 the groups are
            summed.
        save_states: ignored; these kernels save no states.

    Returns:
        The last state, (B, K, N, D), in the dtype of the state, and an empty tensor.

    Raises:
        UsageError: the tensors are on a CPU and Triton's interpreter is off.
    """
    plan = _LaunchPlan(inputs, _is_shared(out, inputs), backward=False)
    state = plan.empty(plan.batch, plan.groups, plan.states, plan.dim)
    starts = None
    if plan.blocks.chunks > 1:
        starts, dt_sums = _chunk_states(plan)
        _pass_states(plan, starts, dt_sums, first=None, last=state)
    for first_group, launched in plan.group_launches:
        _launch(
            chunk_scan_fwd_kernel,
            plan.programs(launched),
            p_start=starts,
            p_end=state if starts is None else None,
            p_dt_sum=None,
            p_out=out.tensor,
            out_strides=out[1:],
            first_group=first_group,
            launched=launched,
            ADDS=first_group > 0,
            **plan.scan_arguments(),
            **plan.state_arguments(),
        )
    return state, state.new_empty(0)


def grouped_scan_backward(
    grad_out: Strided,
    grad_state: Tensor | None,
    inputs: GroupedInputs,
    saved_states: Tensor,  # noqa: ARG001 - always empty
    grad_x: Strided,
    grad_delta: Strided,
    grad_z: Strided | None,
) -> ParameterGradients:
    """Launch the backward kernels: write the gradients of x, delta and z and return all others.

    Memory beside the gradients: the states at the chunk boundaries (two tensors of B K J N D), the gradients
    of B and C per block of 32 channels, those of A, D and the bias per image and chunk, and at most 128 MiB
    of scratch.

    Args:
        grad_out: gradient of the output, (B, L, K, D), channels contiguous; a group stride of 0 where the
            groups were summed.
        grad_state: gradient of the last state, (B, K, N, D), contiguous, of the state's dtype; `None` for
            zero.
        inputs: as in the forward.
        saved_states: ignored; these kernels save no states.
        grad_x: receives (B, L, K, D), channels contiguous; with a group stride of 0 the groups are summed.
        grad_delta: receives (B, L, K, D), contiguous.
        grad_z: receives (B, L, K, D), contiguous.

    Raises:
        UsageError: the tensors are on a CPU and Triton's interpreter is off.
    """
    plan = _LaunchPlan(inputs, _is_shared(grad_x, inputs), backward=True)
    batch, length, groups, dim, states = inputs.sizes
    if grad_state is None:
        grad_state = plan.empty(batch, groups, states, dim).zero_()
    starts, grad_states = None, grad_state
    if plan.blocks.chunks > 1:
        starts, dt_sums = _chunk_states(plan)
        _pass_states(plan, starts, dt_sums, first=None, last=None)
        grad_states = _chunk_state_gradients(plan, grad_out)
        _pass_states(plan, grad_states, dt_sums, first=grad_state, last=None, reverse=True)
    grad_B, grad_C = (plan.empty(plan.channel_blocks, batch, length, groups, states) for _ in range(2))
    parameters = plan.empty(batch, plan.blocks.chunks, groups, states + 2, dim)
    most = programs_per_launch(plan.blocks, states, plan.dtype.itemsize)
    programs = plan.programs(plan.group_launches[0][1])
    tiles = plan.empty(min(most, programs) * scratch_size(plan.blocks, states))
    for first_group, launched in plan.group_launches:
        for first in range(0, programs, most):
            _launch(
                chunk_scan_bwd_kernel,
                min(most, programs - first),
                p_grad_out=grad_out.tensor,
                p_start=starts,
                p_grad_end=grad_states,
                p_tiles=tiles,
                p_grad_x=grad_x.tensor,
                p_grad_delta=grad_delta.tensor,
                p_grad_z=None if grad_z is None else grad_z.tensor,
                p_grad_B=grad_B,
                p_grad_C=grad_C,
                p_grad_parameters=parameters,
                grad_out_strides=grad_out[1:],
                grad_x_strides=grad_x[1:],
                batch=batch,
                first=first,
                first_group=first_group,
                launched=launched,
                ADDS=first_group > 0,
                **plan.scan_arguments(),
                **plan.state_arguments(),
            )
    return ParameterGradients(
        parameters[..., :states, :].sum((0, 1)).transpose(1, 2),
        grad_B.sum(0),
        grad_C.sum(0),
        None if inputs.D is None else parameters[..., states, :].sum((0, 1)),
        None if inputs.delta_bias is None else parameters[..., states + 1, :].sum((0, 1)),
    )


def _chunk_states(plan: _LaunchPlan) -> tuple[Tensor, Tensor]:
    """Return the state that each chunk adds, (B, K, J, N, D), and its sum of dt, (B, K, J, D)."""
    states = plan.empty(plan.batch, plan.groups, plan.blocks.chunks, plan.states, plan.dim)
    dt_sums = plan.empty(plan.batch, plan.groups, plan.blocks.chunks, plan.dim)
    _launch(
        chunk_scan_fwd_kernel,
        plan.programs(plan.groups),
        p_start=None,
        p_end=states,
        p_dt_sum=dt_sums,
        p_out=None,
        out_strides=(0, 0, 0, 0),
        first_group=0,
        launched=plan.groups,
        ADDS=False,
        **plan.scan_arguments(),
        **plan.state_arguments(),
    )
    return states, dt_sums


def _chunk_state_gradients(plan: _LaunchPlan, grad_out: Strided) -> Tensor:
    """Return the gradient of the state before each chunk if that after it has none, (B, K, J, N, D)."""
    grad_states = plan.empty(plan.batch, plan.groups, plan.blocks.chunks, plan.states, plan.dim)
    _launch(
        chunk_state_bwd_kernel,
        plan.programs(plan.groups),
        p_grad_out=grad_out.tensor,
        p_grad_start=grad_states,
        grad_out_strides=grad_out[1:],
        **plan.scan_arguments(),
    )
    return grad_states


def _pass_states(
    plan: _LaunchPlan,
    states: Tensor,
    dt_sums: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    reverse: bool = False,
) -> None:
    """Replace, in place, what each chunk adds to the state by the state that it starts from."""
    _launch(
        state_passing_kernel,
        plan.batch * plan.groups * plan.states * plan.channel_blocks,
        p_states=states,
        p_dt_sums=dt_sums,
        p_A=plan.A,
        p_first=first,
        p_last=last,
        groups=plan.groups,
        dim=plan.dim,
        states=plan.states,
        chunks=plan.blocks.chunks,
        REVERSE=reverse,
        BLOCK_D=plan.blocks.channels,
        TILE=BOUNDARY_TILE,
    )


# Keyed by the tensor rather than the name of the order: `scan_order` returns one tensor per name and size.
@functools.lru_cache(maxsize=64)
def _on_device(order: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may record gradients
        return order.to(device, torch.int32)


def _is_shared(output: Strided, inputs: GroupedInputs) -> bool:
    return inputs.sizes[2] > 1 and output.group == 0


def _launch(kernel: Any, programs: int, **arguments: Any) -> None:
    device = arguments["p_A"].device
    if device.type == "cpu" and not isinstance(kernel, InterpretedFunction):
        raise UsageError(
            "the triton kernels expect CUDA tensors, or TRITON_INTERPRET=1 set before their first import, "
            "received CPU tensors"
        )
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # One warp, so that a sum over the channels or the states of a position takes a few shuffles.
        kernel[(programs,)](**arguments, num_warps=1, enable_fp_fusion=True)
