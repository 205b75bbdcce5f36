"""The grouped scan by the Triton kernels: tensors in, tensors out.

Shapes as in `torch_blocked`: x and delta (B, L, K, D), A (K, D, N), B and C (B, L, K, N). As on a CPU, groups
may share memory: `x` and `out` may be expanded over K. Groups that share an output are scanned by one launch
after the other, each adding to what the last one wrote, so that the result does not depend on timing.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from lightspine.errors import UsageError
from lightspine.ops.torch_scan import GroupedGradients
from lightspine.ops.triton.config import choose_blocks, programs_per_launch, scratch_size
from lightspine.ops.triton.kernels import (
    chunk_scan_bwd_kernel,
    chunk_scan_fwd_kernel,
    chunk_state_bwd_kernel,
    state_passing_kernel,
)

# Chunks that the chain asks for at once.
_CHAIN_TILE = 16


class GroupedInputs(NamedTuple):
    """The tensors of a grouped scan and the order of its walk.

    Attributes:
        x: input, (B, L, K, D), channels adjacent.
        delta: steps before bias and softplus, (B, L, K, D), channels adjacent.
        A: state matrices, (K, D, N).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        D: skips, (K, D).
        z: gate, (B, L, K, D), channels adjacent.
        delta_bias: added to delta, (K, D).
        delta_softplus: pass the steps through softplus.
        reverse: without an order, walk from the last position to the first.
        order: position that each step visits, int32 (K, L), contiguous; None for one after the other.
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
    reverse: bool
    order: Tensor | None


class _Scan:
    """One scan about to be run: its sizes, its cut, and the arguments that its kernels have in common."""

    def __init__(self, inputs: GroupedInputs, shared: bool, backward: bool) -> None:
        self.inputs = inputs
        self.dtype = torch.promote_types(inputs.x.dtype, torch.float32)
        self.batch, self.length, self.groups, self.dim = inputs.x.shape
        self.states = inputs.A.shape[2]
        # Groups that share an output are launched one by one.
        self.group_launches = [(k, 1) for k in range(self.groups)] if shared else [(0, self.groups)]
        rows = self.batch * self.group_launches[0][1]
        self.blocks = choose_blocks(
            self.length, self.dim, self.states, rows, self.dtype.itemsize, backward=backward
        )
        self.channel_blocks = -(-self.dim // self.blocks.channels)
        self.A = inputs.A.to(self.dtype).transpose(1, 2).contiguous()
        self.D, self.delta_bias = (
            None if t is None else t.to(self.dtype).contiguous() for t in (inputs.D, inputs.delta_bias)
        )

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.inputs.x.device)

    def programs(self, groups: int) -> int:
        return self.batch * groups * self.blocks.chunks * self.channel_blocks

    def walk_arguments(self) -> dict[str, Any]:
        """What every kernel takes that walks a sequence."""
        inputs = self.inputs
        return {
            "p_delta": inputs.delta,
            "p_A": self.A,
            "p_C": inputs.C,
            "p_bias": self.delta_bias,
            "p_z": inputs.z,
            "p_order": inputs.order,
            "delta_strides": inputs.delta.stride(),
            "C_strides": inputs.C.stride(),
            "z_strides": (0, 0, 0, 0) if inputs.z is None else inputs.z.stride(),
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

    def input_arguments(self) -> dict[str, Any]:
        """What the kernels take, moreover, that compute the states."""
        return {
            "p_x": self.inputs.x,
            "p_B": self.inputs.B,
            "p_D": self.D,
            "x_strides": self.inputs.x.stride(),
            "B_strides": self.inputs.B.stride(),
        }


def grouped_scan(inputs: GroupedInputs, out: Tensor) -> Tensor:
    """Write the output into `out` and return the last state.

    Args:
        inputs: the tensors of the scan.
        out: (B, L, K, D), channels adjacent; where it is expanded over K, the groups are added up.

    Returns:
        The last state, (B, K, D, N), in the dtype in which states are computed.

    Raises:
        UsageError: the tensors lie on a CPU and Triton's interpreter is off.
    """
    scan = _Scan(inputs, shared=_shared(out), backward=False)
    state = scan.empty(scan.batch, scan.groups, scan.states, scan.dim)
    starts = None
    if scan.blocks.chunks > 1:
        starts, totals = _chunk_states(scan)
        _chain(scan, starts, totals, first=None, last=state)
    for first_group, launched in scan.group_launches:
        _launch(
            chunk_scan_fwd_kernel,
            scan.programs(launched),
            p_start=starts,
            p_end=state if starts is None else None,
            p_total=None,
            p_out=out,
            out_strides=out.stride(),
            first_group=first_group,
            launched=launched,
            ADDS=first_group > 0,
            **scan.walk_arguments(),
            **scan.input_arguments(),
        )
    return state.transpose(2, 3)


def grouped_scan_backward(
    grad_out: Tensor, grad_state: Tensor | None, inputs: GroupedInputs, grad_x: Tensor
) -> tuple[GroupedGradients, Tensor | None]:
    """Write the gradient of x into `grad_x` and return all gradients.

    Beside the gradients it needs the states at the chunks (two tensors of B K J D N numbers), the gradients
    of B and C per block of 32 channels, those of A, D and the bias per image and chunk, and at most 128 MiB
    of scratch.

    Args:
        grad_out: gradient of the output, (B, L, K, D), channels adjacent; expanded over K where the groups
            were added up.
        grad_state: gradient of the last state, (B, K, D, N); None for zeros.
        inputs: as in the forward.
        grad_x: (B, L, K, D), channels adjacent; where it is expanded over K, the groups are added up.

    Returns:
        The gradients, those of delta in its own dtype, those of A, B, C, D and delta_bias in the dtype of the
        state; and the gradient of z in its own dtype.

    Raises:
        UsageError: the tensors lie on a CPU and Triton's interpreter is off.
    """
    scan = _Scan(inputs, shared=_shared(grad_x), backward=True)
    batch, length, groups, states, dim = scan.batch, scan.length, scan.groups, scan.states, scan.dim
    flow = scan.empty(batch, groups, states, dim).zero_()
    if grad_state is not None:
        flow.copy_(grad_state.transpose(2, 3))
    starts = None
    if scan.blocks.chunks > 1:
        starts, totals = _chunk_states(scan)
        _chain(scan, starts, totals, first=None, last=None)
        sent = _chunk_flows(scan, grad_out)
        _chain(scan, sent, totals, first=flow, last=None, reverse=True)
        flow = sent
    grad_delta = torch.empty(inputs.delta.shape, dtype=inputs.delta.dtype, device=inputs.delta.device)
    grad_z = None
    if inputs.z is not None:
        grad_z = torch.empty(inputs.z.shape, dtype=inputs.z.dtype, device=inputs.z.device)
    grad_B, grad_C = (scan.empty(scan.channel_blocks, batch, length, groups, states) for _ in range(2))
    parameters = scan.empty(batch, scan.blocks.chunks, groups, states + 2, dim)
    most = programs_per_launch(scan.blocks, states, scan.dtype.itemsize)
    programs = scan.programs(scan.group_launches[0][1])
    tiles = scan.empty(min(most, programs) * scratch_size(scan.blocks, states))
    for first_group, launched in scan.group_launches:
        for first in range(0, programs, most):
            _launch(
                chunk_scan_bwd_kernel,
                min(most, programs - first),
                p_grad_out=grad_out,
                p_start=starts,
                p_flow=flow,
                p_tiles=tiles,
                p_grad_x=grad_x,
                p_grad_delta=grad_delta,
                p_grad_z=grad_z,
                p_grad_B=grad_B,
                p_grad_C=grad_C,
                p_grad_parameters=parameters,
                grad_out_strides=grad_out.stride(),
                grad_x_strides=grad_x.stride(),
                batch=batch,
                first=first,
                first_group=first_group,
                launched=launched,
                ADDS=first_group > 0,
                **scan.walk_arguments(),
                **scan.input_arguments(),
            )
    grads = GroupedGradients(
        grad_x,
        grad_delta,
        parameters[..., :states, :].sum((0, 1)).transpose(1, 2),
        grad_B.sum(0),
        grad_C.sum(0),
        None if inputs.D is None else parameters[..., states, :].sum((0, 1)),
        None if inputs.delta_bias is None else parameters[..., states + 1, :].sum((0, 1)),
    )
    return grads, grad_z


def _chunk_states(scan: _Scan) -> tuple[Tensor, Tensor]:
    """Return what each chunk makes of a zero state, (B, K, J, N, D), and its sum of steps, (B, K, J, D)."""
    states = scan.empty(scan.batch, scan.groups, scan.blocks.chunks, scan.states, scan.dim)
    totals = scan.empty(scan.batch, scan.groups, scan.blocks.chunks, scan.dim)
    _launch(
        chunk_scan_fwd_kernel,
        scan.programs(scan.groups),
        p_start=None,
        p_end=states,
        p_total=totals,
        p_out=None,
        out_strides=(0, 0, 0, 0),
        first_group=0,
        launched=scan.groups,
        ADDS=False,
        **scan.walk_arguments(),
        **scan.input_arguments(),
    )
    return states, totals


def _chunk_flows(scan: _Scan, grad_out: Tensor) -> Tensor:
    """Return what the adjoint sends out of each chunk's start if nothing enters its end, (B, K, J, N, D)."""
    sent = scan.empty(scan.batch, scan.groups, scan.blocks.chunks, scan.states, scan.dim)
    _launch(
        chunk_state_bwd_kernel,
        scan.programs(scan.groups),
        p_grad_out=grad_out,
        p_sent=sent,
        grad_out_strides=grad_out.stride(),
        **scan.walk_arguments(),
    )
    return sent


def _chain(
    scan: _Scan,
    states: Tensor,
    totals: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    reverse: bool = False,
) -> None:
    """Turn in place what each chunk adds into what enters it."""
    _launch(
        state_passing_kernel,
        scan.batch * scan.groups * scan.states * scan.channel_blocks,
        p_states=states,
        p_totals=totals,
        p_A=scan.A,
        p_first=first,
        p_last=last,
        groups=scan.groups,
        dim=scan.dim,
        states=scan.states,
        chunks=scan.blocks.chunks,
        REVERSE=reverse,
        BLOCK_D=scan.blocks.channels,
        TILE=_CHAIN_TILE,
    )


def _shared(t: Tensor) -> bool:
    return t.shape[2] > 1 and t.stride(2) == 0


def _launch(kernel: Any, programs: int, **arguments: Any) -> None:
    device = arguments["p_A"].device
    if device.type == "cpu" and not isinstance(kernel, InterpretedFunction):
        raise UsageError(
            "the triton kernels expect CUDA tensors, or TRITON_INTERPRET=1 set before their first import, "
            "received CPU tensors"
        )
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # One warp, so that a sum over the channels or the states of a step is a matter of a few shuffles.
        kernel[(programs,)](**arguments, num_warps=1, enable_fp_fusion=True)
