"""The image scan together with the projection of its steps, for inference."""

# The signature of a fake kernel is given by PyTorch: it takes more than it uses.
# ruff: noqa: ARG001

from typing import Any

import torch
import torch.fx
from torch import Tensor

from lightspine.ops.cross_scan import cross_scan
from lightspine.ops.cross_scan.checks import CrossScanInputs, check_inputs
from lightspine.ops.selective_scan.checks import check_tensor


def projected_cross_scan(
    x: Tensor,
    projected: Tensor,
    step_weight: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    order: str = "cross2d",
) -> Tensor:
    """Project the steps and scan a map with them: VMamba's SS2D between its first projection and its norm.

    `cross_scan` reads a step for every direction and channel: four times the map, which a product of small
    rank has to write before. Here the compiled CPU kernel takes that product itself, a few steps at a time.
    On other devices, while gradients are recorded, and for a compiler, tracer or exporter, it is the product
    and `cross_scan`.

    Args:
        x: map, (B, H, W, D), shared by the K directions.
        projected: for each direction the R numbers from which its steps are made, then B, then C, as
            `cross_scan` takes them: (B, H, W, K, R + 2 N).
        step_weight: (K, R, D); a step is softplus(projected @ step_weight + delta_bias).
        A: state matrices, negative, (K, D, N).
        D: skips, (K, D).
        delta_bias: (K, D).
        order: registered scan order with K directions.

    Returns:
        The sum over the directions, (B, H, W, D), float32 for reduced-precision input, else the dtype of `x`.

    Raises:
        UsageError: as `cross_scan`.
    """
    # The stand-in of a tracer has no device to ask for: the order of the conditions counts.
    seen: Any = x
    tracing = isinstance(seen, torch.fx.Proxy) or torch.jit.is_tracing()  # type: ignore[attr-defined]
    recorded = tracing or torch.compiler.is_compiling()
    if recorded or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        dt, B, C = _split(projected, step_weight.shape[1], A.shape[2])
        delta = torch.einsum("bhwkr,krd->bhwkd", dt, step_weight)
        return cross_scan(x, delta, A, B, C, D, delta_bias, True, order)
    return projected_cross_scan_op(x, projected, step_weight, A, D, delta_bias, order)


@torch.library.custom_op("lightspine::projected_cross_scan", mutates_args=(), device_types="cpu")
def projected_cross_scan_op(
    x: Tensor,
    projected: Tensor,
    step_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: str,
) -> Tensor:
    """Return the sum over the directions; the arguments are those of `projected_cross_scan`."""
    # Imported where it is needed: numba takes half a second.
    from lightspine.ops.cross_scan import cpu_backend

    check_tensor(
        "cross_scan", "step_weight", step_weight, (A.shape[0], step_weight.shape[1], x.shape[-1]), x.device
    )
    rank = step_weight.shape[1]
    dt, B, C = _split(projected, rank, A.shape[2])
    inputs = CrossScanInputs(x, dt, A, B, C, D, delta_bias)
    check_inputs(inputs, rank)
    return cpu_backend.forward_projected(inputs, step_weight, order)


@projected_cross_scan_op.register_fake
def _(
    x: Tensor,
    projected: Tensor,
    step_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _split(projected: Tensor, rank: int, states: int) -> tuple[Tensor, Tensor, Tensor]:
    dt, B, C = projected.split([rank, states, states], dim=-1)
    return dt, B, C
