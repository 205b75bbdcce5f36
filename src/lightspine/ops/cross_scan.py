"""The multi-directional scan of a feature map, as in VMamba's SS2D.

`cross_scan` is the public function. It calls the PyTorch operator `lightspine::cross_scan`, which is what
compilers, exporters, tracers and FLOP counters see. `projected_cross_scan` includes the projection of dt, for
inference. README.md in this folder explains the algorithms.
"""

# PyTorch prescribes the signatures of fake kernels and FLOP formulas.
# ruff: noqa: ARG001

import warnings
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightspine.ops import scan_orders, torch_scan
from lightspine.ops.cpu.config import saved_states_shape
from lightspine.ops.dispatch import choose_backend, load_backend, saves_states
from lightspine.ops.flops import counted_backward, counted_forward, scan_flops
from lightspine.ops.inputs import (
    CrossScanInputs,
    check_cross_scan,
    check_directions,
    check_tensor,
    state_dtype,
)
from lightspine.ops.reference import cross_scan_reference

__all__ = ["cross_scan", "projected_cross_scan"]


def __getattr__(name: str) -> Any:
    if name not in ("list_scan_orders", "register_scan_order", "scan_order"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"lightspine.ops.cross_scan.{name} is deprecated: use lightspine.ops.{name}",
        FutureWarning,
        stacklevel=2,
    )
    return getattr(scan_orders, name)


def cross_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    order: str = "cross2d",
    backend: str = "auto",
    save_states: bool = True,
) -> Tensor:
    """Scan a feature map in several directions and sum the results (VMamba, section 4.2, SS2D).

    Every direction has its own dt, state matrix and projections and reads the same map; because the
    projections are pointwise, all tensors are in pixel order, channels innermost. The state, A and dt are
    float32 (float64 for float64 input) also under autocast; x, delta, B and C may be bfloat16 or float16.
    Scripts and traces.

    Args:
        x: feature map, (B, H, W, D), shared by the K directions.
        delta: dt before bias and softplus, (B, H, W, K, D).
        A: state matrices, negative, (K, D, N).
        B: input projections, (B, H, W, K, N).
        C: output projections, (B, H, W, K, N).
        D: skip connections, (K, D).
        delta_bias: added to delta, (K, D).
        delta_softplus: apply softplus to delta after its bias.
        order: registered scan order with K directions: "cross2d" (rows, columns, rows reversed, columns
            reversed), "unidirectional" (rows, four times), "bidirectional" (rows twice, rows reversed twice),
            or one added with `lightspine.ops.register_scan_order`.
        backend: "auto" (by the device of `x`), or one of `lightspine.ops.available_backends()`.
        save_states: save a few states for the backward, which otherwise recomputes them by one more scan.

    Returns:
        The sum over the directions, (B, H, W, D), float32 for reduced-precision input, else the dtype of `x`.

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, an unknown order or one with another number of
            directions, or a backend that is unknown or cannot run here.

    Examples:
        >>> x, delta = torch.randn(1, 5, 7, 8), torch.randn(1, 5, 7, 4, 8)
        >>> A, B, C = -torch.rand(4, 8, 1), torch.randn(1, 5, 7, 4, 1), torch.randn(1, 5, 7, 4, 1)
        >>> cross_scan(x, delta, A, B, C).shape
        torch.Size([1, 5, 7, 8])
    """
    # TorchScript skips a branch only if its condition stands alone; do not join the two with `and`.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif backend == "reference" or torch.onnx.is_in_onnx_export():
        inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
        return _without_operator(inputs, delta_softplus, order, backend)
    save_states = save_states and torch.is_grad_enabled()
    out, _ = torch.ops.lightspine.cross_scan(
        x, delta, A, B, C, D, delta_bias, delta_softplus, order, save_states, backend
    )
    return out


def projected_cross_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    order: str = "cross2d",
) -> Tensor:
    """`cross_scan` with the low-rank projection of dt: SS2D between its first projection and its norm.

    `cross_scan` reads dt for every direction and channel, four times the size of the map. The compiled CPU
    kernel computes it from the low-rank input on the fly. On other devices, while gradients are recorded, and
    for a compiler, tracer or exporter, this function is the projection followed by `cross_scan`.

    Args:
        x: feature map, (B, H, W, D), shared by the K directions.
        projected: for each direction the R inputs of dt, then B, then C, as `cross_scan` takes them:
            (B, H, W, K, R + 2 N).
        dt_weight: (K, R, D); dt is softplus(projected @ dt_weight + delta_bias).
        A: state matrices, negative, (K, D, N).
        D: skip connections, (K, D).
        delta_bias: (K, D).
        order: registered scan order with K directions.

    Returns:
        The sum over the directions, (B, H, W, D), float32 for reduced-precision input, else the dtype of `x`.

    Raises:
        UsageError: as `cross_scan`.
    """
    # The proxy of a tracer has no device: the order of the conditions matters.
    seen: Any = x
    tracing = isinstance(seen, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
    recorded = tracing or torch.compiler.is_compiling()
    if recorded or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        dt, B, C = _split_projected(projected, dt_weight.shape[1], A.shape[2])
        delta = torch.einsum("bhwkr,krd->bhwkd", dt, dt_weight)
        return cross_scan(x, delta, A, B, C, D, delta_bias, True, order)
    return projected_cross_scan_op(x, projected, dt_weight, A, D, delta_bias, order)


def _without_operator(inputs: CrossScanInputs, delta_softplus: bool, order: str, backend: str) -> Tensor:
    """Run the reference, or standard operations that `torch.onnx.export` can write."""
    check_cross_scan(inputs)
    exporting = torch.onnx.is_in_onnx_export()
    if choose_backend(inputs.x.device.type, inputs.x.dtype, exporting, backend) == "reference":
        check_directions(
            inputs.A.shape[0], scan_orders.scan_order(order, *inputs.x.shape[1:3]).shape[0], order
        )
        return cross_scan_reference(*inputs, delta_softplus, order)
    return torch_scan.run_cross_scan(torch_scan.exported_scan, inputs, delta_softplus, order)


def _split_projected(projected: Tensor, rank: int, states: int) -> tuple[Tensor, Tensor, Tensor]:
    dt, B, C = projected.split([rank, states, states], dim=-1)
    return dt, B, C


@torch.library.custom_op("lightspine::cross_scan", mutates_args=())
def cross_scan_op(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the sum over the directions, contiguous (B, H, W, D), and the saved states.

    The arguments are those of `cross_scan`. Which states are saved for the backward, if any, is up to the
    backend.
    """
    inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
    check_cross_scan(inputs)
    name = choose_backend(x.device.type, x.dtype, False, backend)
    out: tuple[Tensor, Tensor] = load_backend(name).cross_scan(inputs, delta_softplus, order, save_states)
    return out


@torch.library.custom_op("lightspine::cross_scan_backward", mutates_args=())
def cross_scan_backward_op(
    grad_out: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    saved_states: Tensor,
    delta_softplus: bool,
    order: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the contiguous gradients of x to delta_bias; an empty tensor for an input that was not given.

    The inputs are those of a forward, which has checked them. `saved_states` may be empty.
    """
    inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
    name = choose_backend(x.device.type, x.dtype, False, backend)
    grads = load_backend(name).cross_scan_backward(grad_out, inputs, saved_states, delta_softplus, order)
    return _or_empty(grads, x)


@cross_scan_op.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_cross_scan(CrossScanInputs(x, delta, A, B, C, D, delta_bias))
    batch, height, width, dim = x.shape
    saved: tuple[int, ...] = (0,)
    if save_states and saves_states(x.device.type, backend):
        saved = saved_states_shape(batch, height * width, A.shape[0], dim, A.shape[2])
    dtype = state_dtype(x.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(saved, dtype=dtype)


@cross_scan_backward_op.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    saved_states: Tensor,
    delta_softplus: bool,
    order: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = CrossScanInputs(
        x.new_empty(x.shape),
        delta.new_empty(delta.shape),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        None if D is None else D.new_empty(D.shape),
        None if delta_bias is None else delta_bias.new_empty(delta_bias.shape),
    )
    return _or_empty(grads, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, delta_softplus, order, _, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = delta_softplus, order, backend


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved_states = ctx.saved_tensors
    grads = torch.ops.lightspine.cross_scan_backward(grad_out, *tensors, saved_states, *ctx.options)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None, None


cross_scan_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("lightspine::projected_cross_scan", mutates_args=(), device_types="cpu")
def projected_cross_scan_op(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: str,
) -> Tensor:
    """Return the sum over the directions; the arguments are those of `projected_cross_scan`."""
    rank = dt_weight.shape[1]
    check_tensor("cross_scan", "dt_weight", dt_weight, (A.shape[0], rank, x.shape[-1]), x.device)
    dt, B, C = _split_projected(projected, rank, A.shape[2])
    inputs = CrossScanInputs(x, dt, A, B, C, D, delta_bias)
    check_cross_scan(inputs, rank)
    out: Tensor = load_backend("cpu").projected_cross_scan(inputs, dt_weight, order)
    return out


@projected_cross_scan_op.register_fake
def _(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=state_dtype(x.dtype))


def _or_empty(
    grads: CrossScanInputs, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias = (
        x.new_empty(0) if grad is None else grad for grad in grads
    )
    return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias


@register_flop_formula(torch.ops.lightspine.cross_scan)
def _count_forward(
    x_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_forward(_published_flops(x_shape, A_shape, shapes))


@register_flop_formula(torch.ops.lightspine.cross_scan_backward)
def _count_backward(
    grad_out_shape: torch.Size,
    x_shape: torch.Size,
    delta_shape: torch.Size,
    A_shape: torch.Size,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    return counted_backward(_published_flops(x_shape, A_shape, shapes))


def _published_flops(x_shape: torch.Size, A_shape: torch.Size, shapes: tuple[object, ...]) -> int:
    batch, height, width, dim = x_shape
    groups, _, state_dim = A_shape
    return scan_flops(batch, height * width, groups * dim, state_dim, with_D=shapes[2] is not None)
