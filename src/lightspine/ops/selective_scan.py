"""The selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t.

`selective_scan` is the public function. It calls the PyTorch operator `lightspine::selective_scan`, which is
what compilers, exporters, tracers and FLOP counters see. README.md in this folder explains the algorithms.
"""

# PyTorch prescribes the signatures of fake kernels and FLOP formulas.
# ruff: noqa: ARG001

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightspine.errors import UsageError
from lightspine.ops import torch_scan
from lightspine.ops.cpu.config import saved_states_shape
from lightspine.ops.derivatives import differentiable_gradients, in_transform, refuse_forward_mode
from lightspine.ops.dispatch import choose_backend, load_backend, runs_on_cpu_kernels
from lightspine.ops.flops import counted_backward, counted_forward, scan_flops
from lightspine.ops.inputs import (
    SelectiveScanInputs,
    check_selective_scan,
    positions_innermost,
    state_dtype,
)
from lightspine.ops.reference import selective_scan_reference

__all__ = ["scan", "selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan of Mamba (section 3.2) over a batch of sequences.

    The arguments are those of `mamba_ssm`'s `selective_scan_fn`. The state, A and dt are float32 (float64 for
    float64 input) also under autocast; u, delta, B, C and z may be bfloat16 or float16. Tensors need not be
    contiguous; the fastest layout is channels innermost, a `transpose(1, 2)` of (B, L, D) tokens. The CPU
    kernels also read contiguous sequences (B, D, L) in place.

    Args:
        u: input, (B, D, L).
        delta: dt before bias and softplus, (B, D, L).
        A: state matrix, negative, (D, N).
        B: input projection: (B, N, L); (B, K, N, L), where channel d reads group d // (D / K); or constant,
            (D, N).
        C: output projection, in one of the shapes of B.
        D: skip connection, (D,): adds D u to the output.
        z: gate, (B, D, L): the output is multiplied by SiLU(z).
        delta_bias: added to delta, (D,).
        delta_softplus: apply softplus to delta after its bias.
        return_last_state: also return the state after the last position.
        reverse: scan from the last position to the first; the last state is then that of position 0.
        backend: "auto" (by the device of `u`), or one of `lightspine.ops.available_backends()`.

    Returns:
        The output (B, D, L) in the dtype of `u`; with `return_last_state` also the state, (B, D, N).

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, or a backend that is unknown or cannot run
            here.

    Examples:
        >>> u, delta = torch.randn(2, 8, 50), torch.randn(2, 8, 50)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 50), torch.randn(2, 4, 50)
        >>> selective_scan(u, delta, A, B, C, delta_softplus=True).shape
        torch.Size([2, 8, 50])
    """
    B, C = grouped_projections(u, A, B, C)
    if backend == "reference" or in_transform() or torch.onnx.is_in_onnx_export():
        inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
        out, state = _without_operator(inputs, delta_softplus, reverse, backend)
    else:
        # A trace may be run with and without gradients.
        save_states = torch.is_grad_enabled() and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        out, state, _ = torch.ops.lightspine.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states, backend
        )
    return (out, state) if return_last_state else out


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
    save_states: bool = True,
) -> Tensor:
    """`selective_scan` for models: one return type and 4-D B and C, so that it scripts and traces.

    `save_states=False` saves no states for the backward, which then recomputes them by one more scan;
    `lightspine.layers.checkpointing` uses it.
    """
    # TorchScript skips a branch only if its condition stands alone; do not join the two with `and`.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif backend == "reference" or in_transform() or torch.onnx.is_in_onnx_export():
        inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
        return _without_operator(inputs, delta_softplus, reverse, backend)[0]
    elif torch.jit.is_tracing():  # type: ignore[attr-defined]
        save_states = False  # a trace may be run with and without gradients
    save_states = save_states and torch.is_grad_enabled()
    out, _, _ = torch.ops.lightspine.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states, backend
    )
    return out


def _without_operator(
    inputs: SelectiveScanInputs, delta_softplus: bool, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Run the reference, or standard operations that can be differentiated or written by an exporter."""
    check_selective_scan(inputs)
    exporting = torch.onnx.is_in_onnx_export()
    if choose_backend(inputs.u.device.type, inputs.u.dtype, exporting, backend) == "reference":
        return selective_scan_reference(*inputs, delta_softplus, reverse)
    form = torch_scan.exported_scan if exporting else torch_scan.unrolled_scan
    return torch_scan.run_selective_scan(form, inputs, delta_softplus, reverse)


def grouped_projections(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Bring B and C, each in any of its three shapes, to (B, K, N, L) with one K."""
    if B.dim() == 3:
        B = B[:, None]
    if C.dim() == 3:
        C = C[:, None]
    if B.dim() == 4 and C.dim() == 4:
        return B, C
    # A constant projection differs between channels: every channel becomes a group of its own.
    return _projection_per_channel("B", u, A, B), _projection_per_channel("C", u, A, C)


def _projection_per_channel(name: str, u: Tensor, A: Tensor, t: Tensor) -> Tensor:
    if u.dim() == 3:
        batch, dim, length = u.shape
        if t.dim() == 4 and t.shape[1] and dim % t.shape[1] == 0:
            return t.repeat_interleave(dim // t.shape[1], dim=1)
        if t.shape == A.shape:
            return t[None, :, :, None].expand(batch, -1, -1, length)
    raise UsageError(
        f"selective_scan expects {name} of shape (B, N, L), (B, K, N, L) or (D, N), "
        f"received {tuple(t.shape)} with u {tuple(u.shape)} and A {tuple(A.shape)}"
    )


@torch.library.custom_op("lightspine::selective_scan", mutates_args=())
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, D, L), the last state (B, D, N) and the saved states.

    The arguments are those of `selective_scan`. On the CPU kernels output and gradients have the memory
    layouts of u, delta and z if positions are innermost there; otherwise, and on every other backend,
    channels are innermost. A compiler is told these strides. Which states are saved for the backward, if any,
    is up to the backend.
    """
    refuse_forward_mode("selective_scan")
    inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
    check_selective_scan(inputs)
    name = choose_backend(u.device.type, u.dtype, False, backend)
    out: tuple[Tensor, Tensor, Tensor] = load_backend(name).selective_scan(
        inputs, delta_softplus, reverse, save_states
    )
    return out


@torch.library.custom_op("lightspine::selective_scan_backward", mutates_args=())
def selective_scan_backward_op(
    grad_out: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved_states: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u to delta_bias; an empty tensor for an input that was not given.

    The inputs are those of a forward, which has checked them. `saved_states` may be empty.
    """
    refuse_forward_mode("selective_scan_backward")
    inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
    name = choose_backend(u.device.type, u.dtype, False, backend)
    grads = load_backend(name).selective_scan_backward(
        grad_out, grad_state, inputs, saved_states, delta_softplus, reverse
    )
    return or_empty(grads, u)


@selective_scan_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_selective_scan(SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias))
    dtype = state_dtype(u.dtype)
    batch, dim, length = u.shape
    saved: tuple[int, ...] = (0,)
    on_cpu_kernels = runs_on_cpu_kernels(u.device.type, backend)
    if save_states and on_cpu_kernels:
        saved = saved_states_shape(batch, length, B.shape[1], dim // B.shape[1], A.shape[1])
    return (
        _empty_sequence(u, on_cpu_kernels),
        u.new_empty(batch, *A.shape, dtype=dtype),
        u.new_empty(saved, dtype=dtype),
    )


@selective_scan_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved_states: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    keeps_layout = runs_on_cpu_kernels(u.device.type, backend)
    inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
    return or_empty(empty_gradients(inputs, keeps_layout), u)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, delta_softplus, reverse, _, backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = delta_softplus, reverse, backend


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved_states = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradients are to be differentiated (create_graph=True)
        delta_softplus, reverse, _ = ctx.options
        plain = functools.partial(_run_plain, delta_softplus=delta_softplus, reverse=reverse)
        given = differentiable_gradients(plain, tensors, (grad_out, grad_state))
        return *given, None, None, None, None
    grads = torch.ops.lightspine.selective_scan_backward(
        grad_out, grad_state, *tensors, saved_states, *ctx.options
    )
    given = [None if t is None else grad for t, grad in zip(tensors, grads, strict=True)]
    return *given, None, None, None, None


def _run_plain(*tensors: Any, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    inputs = SelectiveScanInputs(*tensors)
    return torch_scan.run_selective_scan(torch_scan.unrolled_scan, inputs, delta_softplus, reverse)


selective_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _empty_sequence(t: Tensor, keeps_layout: bool) -> Tensor:
    batch, dim, length = t.shape
    if keeps_layout and positions_innermost(t):
        return t.new_empty(batch, dim, length)
    return t.new_empty(batch, length, dim).transpose(1, 2)


def _empty_projection(t: Tensor) -> Tensor:
    batch, groups, states, length = t.shape
    return t.new_empty(batch, length, groups, states).permute(0, 2, 3, 1)


def empty_gradients(inputs: SelectiveScanInputs, keeps_layout: bool = False) -> SelectiveScanInputs:
    """Allocate the gradients of a scan in the memory layout in which the backends return them.

    Args:
        inputs: tensors of the scan.
        keeps_layout: those of u, delta and z have the layouts of these, as on the CPU kernels.
    """
    u, delta, A, B, C, D, z, delta_bias = inputs
    return SelectiveScanInputs(
        _empty_sequence(u, keeps_layout),
        _empty_sequence(delta, keeps_layout),
        A.new_empty(A.shape),
        _empty_projection(B),
        _empty_projection(C),
        None if D is None else D.new_empty(D.shape),
        None if z is None else _empty_sequence(z, keeps_layout),
        None if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )


def or_empty(
    grads: SelectiveScanInputs, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Replace the gradients of inputs that were not given by empty tensors: an operator returns no `None`."""
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias = (
        u.new_empty(0) if grad is None else grad for grad in grads
    )
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias


@register_flop_formula(torch.ops.lightspine.selective_scan)
def _count_forward(
    u_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_forward(_published_flops(u_shape, A_shape, shapes))


@register_flop_formula(torch.ops.lightspine.selective_scan_backward)
def _count_backward(
    grad_out_shape: torch.Size,
    grad_state_shape: torch.Size,
    u_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_backward(_published_flops(u_shape, A_shape, shapes))


def _published_flops(u_shape: torch.Size, A_shape: torch.Size, shapes: tuple[object, ...]) -> int:
    batch, dim, length = u_shape
    _, _, D_shape, z_shape = shapes[:4]
    return scan_flops(batch, length, dim, A_shape[1], with_D=D_shape is not None, with_z=z_shape is not None)
