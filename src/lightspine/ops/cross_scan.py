"""The multi-directional scan of a feature map, as in VMamba's SS2D.

`cross_scan` is the public function. It calls the PyTorch operator `lightspine::cross_scan`, which is what
compilers, exporters, tracers and FLOP counters see. `projected_cross_scan` includes the projection of dt: on
a CPU for inference (`lightspine::projected_cross_scan`), by the Triton kernels also for training
(`lightspine::fused_cross_scan`). README.md in this folder explains the algorithms.
"""

# PyTorch prescribes the signatures of fake kernels and FLOP formulas.
# ruff: noqa: ARG001

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightspine.ops import scan_orders, torch_scan
from lightspine.ops.cpu.config import saved_states_shape
from lightspine.ops.derivatives import differentiable_gradients, in_transform, refuse_forward_mode
from lightspine.ops.dispatch import choose_backend, is_exporting, load_backend, runs_on_cpu_kernels
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
    elif backend == "reference" or in_transform() or torch.onnx.is_in_onnx_export():
        inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
        return _without_operator(inputs, delta_softplus, order, backend)
    elif torch.jit.is_tracing():  # type: ignore[attr-defined]
        save_states = False  # a trace may be run with and without gradients
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
    backend: str = "auto",
    save_states: bool = True,
) -> Tensor:
    """`cross_scan` with the low-rank projection of dt: SS2D between its first projection and its norm.

    `cross_scan` reads dt for every direction and channel, four times the size of the map. The kernels compute
    it from the low-rank input on the fly: the compiled CPU kernel while no gradient is recorded and no
    compiler traces, the Triton kernels for one state per channel, forward and backward (see
    `fuses_projection`). Otherwise this function is the projection followed by `cross_scan`. The Triton
    kernels round `dt_weight` to the dtype of `projected`, as autocast does.

    Args:
        x: feature map, (B, H, W, D), shared by the K directions.
        projected: for each direction the R inputs of dt, then B, then C, as `cross_scan` takes them:
            (B, H, W, K, R + 2 N).
        dt_weight: (K, R, D); dt is softplus(projected @ dt_weight + delta_bias).
        A: state matrices, negative, (K, D, N).
        D: skip connections, (K, D).
        delta_bias: (K, D).
        order: registered scan order with K directions.
        backend: as in `cross_scan`.
        save_states: save a few states for the backward of the Triton kernels and of `cross_scan`, which
            otherwise recompute them.

    Returns:
        The sum over the directions, (B, H, W, D), float32 for reduced-precision input, else the dtype of `x`.

    Raises:
        UsageError: as `cross_scan`.
    """
    if fuses_projection(x, A.shape[2], backend):
        save_states = save_states and torch.is_grad_enabled()
        out: Tensor = torch.ops.lightspine.fused_cross_scan(
            x, projected, dt_weight, A, D, delta_bias, order, save_states
        )[0]
        return out
    # The proxy of a tracer has no device: the order of the conditions matters.
    seen: Any = x
    tracing = isinstance(seen, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
    recorded = tracing or torch.compiler.is_compiling() or in_transform()
    compiled = backend in ("auto", "cpu") and not recorded and x.device.type == "cpu"
    tensors = (x, projected, dt_weight, A, D, delta_bias)
    if compiled and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return projected_cross_scan_op(x, projected, dt_weight, A, D, delta_bias, order)
    delta, B, C = _project_dt(projected, dt_weight, A.shape[2])
    return cross_scan(x, delta, A, B, C, D, delta_bias, True, order, backend, save_states)


# How many callers observe the steps of the models: a plain number, which torch.compile reads and guards.
_observers = 0


@contextmanager
def unfused_projection() -> Iterator[None]:
    """Context in which SS2D calls `cross_scan` on every device, for code that observes its dt."""
    global _observers
    _observers += 1
    try:
        yield
    finally:
        _observers -= 1


def fuses_projection(x: Tensor, state_dim: int, backend: str = "auto") -> bool:
    """Return whether `projected_cross_scan` runs the Triton kernels that project dt themselves.

    They take one state per channel, float16, bfloat16 or float32 maps (float64 in Triton's interpreter) and
    an NVIDIA device of compute capability 8.0 or higher. Tracers and exporters get standard operators.
    """
    seen: Any = x
    if state_dim != 1 or _observers or isinstance(seen, torch.fx.Proxy) or in_transform():
        return False
    if x.device.type != "cuda" and backend != "triton":
        return False
    exporting = torch.onnx.is_in_onnx_export() or is_exporting()
    if exporting or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return _has_fused_kernels(x.device, x.dtype, backend)


@torch.compiler.assume_constant_result
def _has_fused_kernels(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    if choose_backend(device.type, dtype, False, backend) != "triton":
        return False
    from lightspine.ops.triton.cross_scan_launch import supports

    return supports(device, dtype)


def _without_operator(inputs: CrossScanInputs, delta_softplus: bool, order: str, backend: str) -> Tensor:
    """Run the reference, or standard operations that can be differentiated or written by an exporter."""
    check_cross_scan(inputs)
    exporting = torch.onnx.is_in_onnx_export()
    if choose_backend(inputs.x.device.type, inputs.x.dtype, exporting, backend) == "reference":
        check_directions(
            inputs.A.shape[0], scan_orders.scan_order(order, *inputs.x.shape[1:3]).shape[0], order
        )
        return cross_scan_reference(*inputs, delta_softplus, order)
    form = torch_scan.exported_scan if exporting else torch_scan.unrolled_scan
    return torch_scan.run_cross_scan(form, inputs, delta_softplus, order)


def _split_projected(projected: Tensor, rank: int, states: int) -> tuple[Tensor, Tensor, Tensor]:
    dt, B, C = projected.split([rank, states, states], dim=-1)
    return dt, B, C


def _project_dt(projected: Tensor, dt_weight: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return delta, (B, H, W, K, D), and B and C, (B, H, W, K, N)."""
    dt, B, C = _split_projected(projected, dt_weight.shape[1], states)
    return torch.einsum("bhwkr,krd->bhwkd", dt, dt_weight), B, C


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
    refuse_forward_mode("cross_scan")
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
    refuse_forward_mode("cross_scan_backward")
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
    if save_states and runs_on_cpu_kernels(x.device.type, backend):
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
    if torch.is_grad_enabled():  # the gradients are to be differentiated (create_graph=True)
        delta_softplus, order, _ = ctx.options
        plain = functools.partial(_run_plain, delta_softplus=delta_softplus, order=order)
        return *differentiable_gradients(plain, tensors, (grad_out,)), None, None, None, None
    grads = torch.ops.lightspine.cross_scan_backward(grad_out, *tensors, saved_states, *ctx.options)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None, None, None


def _run_plain(*tensors: Any, delta_softplus: bool, order: str) -> Tensor:
    return torch_scan.run_cross_scan(
        torch_scan.unrolled_scan, CrossScanInputs(*tensors), delta_softplus, order
    )


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
    refuse_forward_mode("projected_cross_scan")
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


@torch.library.custom_op("lightspine::fused_cross_scan", mutates_args=())
def fused_cross_scan_op(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: str,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum over the directions, contiguous (B, H, W, D), and the states saved for the backward.

    The arguments are those of `projected_cross_scan`, with one state per channel.
    """
    refuse_forward_mode("fused_cross_scan")
    _check_fused(x, projected, dt_weight, A, D, delta_bias)
    from lightspine.ops.triton import cross_scan_launch as launch

    walk = launch.find_walk(order, x.shape[1], x.shape[2], x.device)
    check_directions(A.shape[0], walk.order.shape[0] * walk.pairs, order)
    inputs = launch.ProjectedInputs(
        x.flatten(1, 2), projected.flatten(1, 2), dt_weight, A[..., 0], D, delta_bias
    )
    out, saved = launch.cross_scan_forward(inputs, walk, save_states)
    if saved is None:
        return out.view(x.shape), out.new_empty(0), out.new_empty(0)
    return out.view(x.shape), saved.tiles, saved.sums


@torch.library.custom_op("lightspine::fused_cross_scan_backward", mutates_args=())
def fused_cross_scan_backward_op(
    grad_out: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    saved_tiles: Tensor,
    saved_sums: Tensor,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the contiguous gradients of x to delta_bias; an empty tensor for an input that was not given.

    The inputs are those of a forward, which has checked them. The saved states may be empty.
    """
    refuse_forward_mode("fused_cross_scan_backward")
    from lightspine.ops.triton import cross_scan_launch as launch

    walk = launch.find_walk(order, x.shape[1], x.shape[2], x.device)
    inputs = launch.ProjectedInputs(
        x.flatten(1, 2), projected.flatten(1, 2), dt_weight, A[..., 0], D, delta_bias
    )
    saved = launch.SavedStates(saved_tiles, saved_sums) if saved_tiles.numel() else None
    by_x, by_projected, by_weight, by_A, by_D, by_bias = launch.cross_scan_backward(
        grad_out.flatten(1, 2), inputs, walk, saved
    )
    return (
        by_x.to(x.dtype).view(x.shape),
        by_projected.to(projected.dtype).view(projected.shape),
        by_weight.transpose(1, 2).to(dt_weight.dtype).contiguous(),
        by_A.to(A.dtype).reshape(A.shape),
        x.new_empty(0) if D is None else by_D.to(D.dtype),
        x.new_empty(0) if delta_bias is None else by_bias.to(delta_bias.dtype),
    )


@fused_cross_scan_op.register_fake
def _(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: str,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_fused(x, projected, dt_weight, A, D, delta_bias)
    dtype = state_dtype(x.dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    if not save_states:
        return out, x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    from lightspine.ops.triton.cross_scan_launch import saved_shapes

    tiles, sums = saved_shapes(x.shape[0], x.shape[1] * x.shape[2], A.shape[0], x.shape[3])
    return out, x.new_empty(tiles, dtype=dtype), x.new_empty(sums, dtype=dtype)


@fused_cross_scan_backward_op.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    saved_tiles: Tensor,
    saved_sums: Tensor,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = [t.new_empty(t.shape) for t in (x, projected, dt_weight, A)]
    optional = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (D, delta_bias)]
    return given[0], given[1], given[2], given[3], optional[0], optional[1]


def _check_fused(
    x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    rank = dt_weight.shape[1]
    check_tensor("cross_scan", "dt_weight", dt_weight, (A.shape[0], rank, x.shape[-1]), x.device)
    dt, B, C = _split_projected(projected, rank, A.shape[2])
    check_cross_scan(CrossScanInputs(x, dt, A, B, C, D, delta_bias), rank)


def _setup_fused_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, order, _ = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.order = order


def _fused_backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, tiles, sums = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradients are to be differentiated (create_graph=True)
        plain = functools.partial(_project_and_scan, order=ctx.order)
        return *differentiable_gradients(plain, tensors, (grad_out,)), None, None
    grads = torch.ops.lightspine.fused_cross_scan_backward(grad_out, *tensors, tiles, sums, ctx.order)
    given = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *given, None, None


def _project_and_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: str,
) -> Tensor:
    delta, B, C = _project_dt(projected, dt_weight, A.shape[2])
    return _run_plain(x, delta, A, B, C, D, delta_bias, delta_softplus=True, order=order)


fused_cross_scan_op.register_autograd(_fused_backward, setup_context=_setup_fused_context)


@register_flop_formula(torch.ops.lightspine.fused_cross_scan)
def _count_fused_forward(
    x_shape: torch.Size,
    projected_shape: torch.Size,
    weight_shape: torch.Size,
    A_shape: torch.Size,
    D_shape: torch.Size | None,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    scan, projection = _fused_flops(x_shape, weight_shape, A_shape, D_shape)
    return counted_forward(scan) + 2 * projection


@register_flop_formula(torch.ops.lightspine.fused_cross_scan_backward)
def _count_fused_backward(
    grad_out_shape: torch.Size,
    x_shape: torch.Size,
    projected_shape: torch.Size,
    weight_shape: torch.Size,
    A_shape: torch.Size,
    D_shape: torch.Size | None,
    *shapes: object,
    out_shape: object,
    **_: object,
) -> int:
    scan, projection = _fused_flops(x_shape, weight_shape, A_shape, D_shape)
    return counted_backward(scan) + 4 * projection


def _fused_flops(
    x_shape: torch.Size, weight_shape: torch.Size, A_shape: torch.Size, D_shape: torch.Size | None
) -> tuple[int, int]:
    """Return the published operations of the scan, and the multiply-adds of the projection of dt."""
    batch, height, width, dim = x_shape
    positions = batch * height * width
    scan = scan_flops(batch, height * width, A_shape[0] * dim, A_shape[2], with_D=D_shape is not None)
    return scan, positions * weight_shape[0] * weight_shape[1] * weight_shape[2]


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
