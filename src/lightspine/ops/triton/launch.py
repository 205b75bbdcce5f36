"""Launch of the Triton kernels for a grouped scan.

Groups that share an output, as the directions of a cross scan do, are launched one after the other. Each adds
to the output of the previous one, so the result is deterministic.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from lightspine.errors import UsageError
from lightspine.ops.inputs import GroupedInputs, ParameterGradients, Strided
from lightspine.ops.triton.config import (
    GRAD_WARPS,
    PASSING_CHANNELS,
    PASSING_CHUNKS,
    STRETCH,
    ScanConfig,
    choose_config,
)
from lightspine.ops.triton.constants import use_constant
from lightspine.ops.triton.kernels import (
    chunk_adjoint_kernel,
    chunk_scan_fwd_kernel,
    state_passing_kernel,
)
from lightspine.ops.triton.scan_backward_kernel import chunk_scan_bwd_kernel

# Sequences (B, D, L) are copied to tokens.
READS_SEQUENCES = False


class _Launcher:
    """The launches of one scan: its sizes, its configuration and the arguments that its kernels share."""

    def __init__(self, inputs: GroupedInputs, config: ScanConfig, *, shared: bool) -> None:
        self.inputs, self.dtype, self.config = inputs, inputs.dtype, config
        self.batch, self.length, self.groups, self.dim, self.states = inputs.sizes
        A = inputs.A.view(self.groups, self.dim, self.states)
        self.A = A.to(self.dtype).transpose(1, 2).contiguous()
        self.D, self.delta_bias = (
            None if t is None else t.to(self.dtype).contiguous() for t in (inputs.D, inputs.delta_bias)
        )
        # (first group, number of groups) of each launch that writes to the output.
        self.launches = [(k, 1) for k in range(self.groups)] if shared else [(0, self.groups)]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.inputs.x.tensor.device)

    def programs(self, groups: int, block_d: int) -> int:
        return self.batch * groups * self.config.chunks * -(-self.dim // block_d)

    def scan_arguments(self) -> dict[str, Any]:
        """Arguments of every kernel that scans a sequence."""
        inputs, config = self.inputs, self.config
        return {
            "p_dt": inputs.delta.tensor,
            "p_A": self.A,
            "p_C": inputs.C.tensor,
            "p_bias": self.delta_bias,
            "p_z": None if inputs.z is None else inputs.z.tensor,
            "p_order": None
            if inputs.order is None
            else use_constant(_on_device(inputs.order, self.A.device)),
            "dt_strides": inputs.delta[1:],
            "C_strides": inputs.C[1:],
            "z_strides": (0, 0, 0, 0) if inputs.z is None else inputs.z[1:],
            "length": self.length,
            "groups": self.groups,
            "dim": self.dim,
            "states": self.states,
            "chunk": config.chunk,
            "chunks": config.chunks,
            "reversed_groups": inputs.reversed_groups,
            "SOFTPLUS": inputs.delta_softplus,
            "BLOCK_N": config.block_n,
        }

    def state_arguments(self) -> dict[str, Any]:
        """Further arguments of the kernels that compute states."""
        inputs = self.inputs
        return {
            "p_x": inputs.x.tensor,
            "p_B": inputs.B.tensor,
            "p_D": self.D,
            "x_strides": inputs.x[1:],
            "B_strides": inputs.B[1:],
        }

    def scan(
        self,
        *,
        out: Strided | None = None,
        start: Tensor | None = None,
        end: Tensor | None = None,
        dt_sum: Tensor | None = None,
    ) -> None:
        for first_group, launched_groups in self.launches if out is not None else [(0, self.groups)]:
            launch(
                chunk_scan_fwd_kernel,
                self.programs(launched_groups, self.config.block_d),
                BLOCK_D=self.config.block_d,
                FAST_MATH=self.config.fast_math,
                p_start=start,
                p_end=end,
                p_dt_sum=dt_sum,
                p_out=None if out is None else out.tensor,
                out_strides=(0, 0, 0, 0) if out is None else out[1:],
                first_group=first_group,
                launched_groups=launched_groups,
                ACCUMULATE=first_group > 0,
                **self.scan_arguments(),
                **self.state_arguments(),
            )

    def chunk_starts(self, final: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the state before each chunk, (B, K, J, N, D), and the sums of dt, (B, K, J, D)."""
        shape = (self.batch, self.groups, self.config.chunks)
        states, dt_sums = self.empty(*shape, self.states, self.dim), self.empty(*shape, self.dim)
        self.scan(end=states, dt_sum=dt_sums)
        self.pass_states(states, dt_sums, initial=None, final=final, reverse=False)
        return states, dt_sums

    def pass_states(
        self, states: Tensor, dt_sums: Tensor, *, initial: Tensor | None, final: Tensor | None, reverse: bool
    ) -> None:
        launch(
            state_passing_kernel,
            self.batch * self.groups * self.states * -(-self.dim // PASSING_CHANNELS),
            p_states=states,
            p_dt_sums=dt_sums,
            p_A=self.A,
            p_initial=initial,
            p_final=final,
            groups=self.groups,
            dim=self.dim,
            states=self.states,
            chunks=self.config.chunks,
            REVERSE=reverse,
            BLOCK_D=PASSING_CHANNELS,
            BLOCK_J=PASSING_CHUNKS,
        )


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
    shared = _is_shared(out, inputs)
    config = _choose_config(inputs, shared, backward=False)
    launcher = _Launcher(inputs, config, shared=shared)
    state = launcher.empty(launcher.batch, launcher.groups, launcher.states, launcher.dim)
    if config.chunks > 1:
        starts, _ = launcher.chunk_starts(final=state)
        launcher.scan(out=out, start=starts)
    else:
        launcher.scan(out=out, end=state)
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

    The states are recomputed. Images are processed in slices, so that the temporary memory stays below some
    12 MiB, or that of one image: states and adjoints at the chunks, and the gradients of B and C per block of
    channels.

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
    shared = _is_shared(grad_x, inputs)
    config = _choose_config(inputs, shared, backward=True)
    batch, length, groups, dim, states = inputs.sizes
    device = inputs.x.tensor.device
    grad_B, grad_C = (
        torch.empty(batch, length, groups, states, dtype=inputs.dtype, device=device) for _ in "BC"
    )
    grad_A, grad_D, grad_bias = (
        torch.zeros(shape, dtype=inputs.dtype, device=device)
        for shape in ((groups, states, dim), (groups, dim), (groups, dim))
    )
    for images in _slices(batch, config.images_per_slice):
        launcher = _Launcher(_select_images(inputs, images), config, shared=shared)
        size = launcher.batch
        part_grad_out, part_grad_x, part_grad_delta = (
            _select(t, images) for t in (grad_out, grad_x, grad_delta)
        )
        part_grad_z = None if grad_z is None else _select(grad_z, images)
        starts, adjoint, dt_sums = _states_at_chunks(
            launcher, part_grad_out, None if grad_state is None else grad_state[images]
        )
        blocks = -(-dim // config.grad_block_d)
        partial_B, partial_C = (launcher.empty(blocks, size, length, groups, states) for _ in "BC")
        partial_D = torch.empty_like(dt_sums)
        for first_group, launched_groups in launcher.launches:
            launch(
                chunk_scan_bwd_kernel,
                launcher.programs(launched_groups, config.grad_block_d),
                num_warps=GRAD_WARPS,
                p_grad_out=part_grad_out.tensor,
                p_start=starts,
                p_adjoint=adjoint,
                p_grad_x=part_grad_x.tensor,
                p_grad_dt=part_grad_delta.tensor,
                p_grad_z=None if part_grad_z is None else part_grad_z.tensor,
                p_grad_B=partial_B,
                p_grad_C=partial_C,
                p_grad_D=partial_D,
                p_grad_bias=dt_sums,
                grad_out_strides=part_grad_out[1:],
                grad_x_strides=part_grad_x[1:],
                batch=size,
                first_group=first_group,
                launched_groups=launched_groups,
                ACCUMULATE=first_group > 0,
                BLOCK_D=config.grad_block_d,
                STRETCH=STRETCH,
                STRETCHES=config.stretches,
                WARPS=GRAD_WARPS,
                **launcher.scan_arguments(),
                **launcher.state_arguments(),
            )
        torch.sum(partial_B, 0, out=grad_B[images])
        torch.sum(partial_C, 0, out=grad_C[images])
        # The kernel has put the gradients of A and of the bias in place of the adjoints and the sums of dt.
        grad_A += adjoint.sum((0, 2))
        grad_D += partial_D.sum((0, 2))
        grad_bias += dt_sums.sum((0, 2))
    return ParameterGradients(
        grad_A.transpose(1, 2).contiguous(),
        grad_B,
        grad_C,
        None if inputs.D is None else grad_D,
        None if inputs.delta_bias is None else grad_bias,
    )


def _states_at_chunks(
    launcher: _Launcher, grad_out: Strided, grad_state: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute the states between chunks for the backward.

    Returns the state before each chunk (`None` for zeros), the adjoint at its end, and its sum of dt. The
    backward writes to the last two.
    """
    config = launcher.config
    shape = (launcher.batch, launcher.groups, config.chunks)
    if config.chunks == 1:
        adjoint = launcher.empty(*shape, launcher.states, launcher.dim)
        adjoint.copy_(grad_state.unsqueeze(2)) if grad_state is not None else adjoint.zero_()
        return None, adjoint, launcher.empty(*shape, launcher.dim)
    starts, dt_sums = launcher.chunk_starts(final=None)
    adjoint = torch.empty_like(starts)
    launch(
        chunk_adjoint_kernel,
        launcher.programs(launcher.groups, config.block_d),
        BLOCK_D=config.block_d,
        FAST_MATH=config.fast_math,
        p_grad_out=grad_out.tensor,
        p_adjoint=adjoint,
        grad_out_strides=grad_out[1:],
        **launcher.scan_arguments(),
    )
    launcher.pass_states(adjoint, dt_sums, initial=grad_state, final=None, reverse=True)
    return starts, adjoint, dt_sums


def _choose_config(inputs: GroupedInputs, shared: bool, *, backward: bool) -> ScanConfig:
    return choose_config(
        *inputs.sizes, inputs.dtype, launched_groups=1 if shared else inputs.sizes[2], backward=backward
    )


def _slices(batch: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, batch)) for first in range(0, batch, size))


def _select(t: Strided, images: slice) -> Strided:
    """Select images; the first axis of every tensor that the kernels read is the batch."""
    return t._replace(tensor=t.tensor[images])


def _select_images(inputs: GroupedInputs, images: slice) -> GroupedInputs:
    selected: dict[str, Any] = {
        name: _select(getattr(inputs, name), images)
        for name in ("x", "delta", "B", "C", "z")
        if getattr(inputs, name) is not None
    }
    return inputs._replace(sizes=(images.stop - images.start, *inputs.sizes[1:]), **selected)


# Keyed by the tensor rather than the name of the order: `scan_order` returns one tensor per name and size.
@functools.lru_cache(maxsize=64)
def _on_device(order: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may record gradients
        return order.to(device, torch.int32)


def _is_shared(output: Strided, inputs: GroupedInputs) -> bool:
    return inputs.sizes[2] > 1 and output.group == 0


def launch(kernel: Any, programs: int, *, num_warps: int = 1, **arguments: Any) -> None:
    """Run a kernel on the device of its tensors.

    Args:
        kernel: the kernel.
        programs: size of its grid.
        num_warps: warps of a program; one warp sums over channels or states by a few shuffles.
        arguments: those of the kernel by name.

    Raises:
        UsageError: the tensors are on a CPU and Triton's interpreter is off.
    """
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type == "cpu" and not isinstance(kernel, InterpretedFunction):
        raise UsageError(
            "the triton kernels expect CUDA tensors, or TRITON_INTERPRET=1 set before their first import, "
            "received CPU tensors"
        )
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, num_warps=num_warps, enable_fp_fusion=True)
