"""The multi-directional image scan of SS2D: one map in, one map out (see README.md beside this)."""

import torch
from torch import Tensor

from lightspine.ops.cross_scan import torch_backend
from lightspine.ops.cross_scan.checks import CrossScanInputs, check_directions, check_inputs
from lightspine.ops.cross_scan.operator import cross_scan_op
from lightspine.ops.cross_scan.reference import cross_scan_reference
from lightspine.ops.dispatch import choose_backend
from lightspine.ops.scan_orders import list_scan_orders, register_scan_order, scan_order
from lightspine.ops.torch_scan import exported_scan

__all__ = [
    "cross_scan",
    "cross_scan_op",
    "cross_scan_reference",
    "list_scan_orders",
    "register_scan_order",
    "scan_order",
]


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
    keep: bool = True,
) -> Tensor:
    """Scan a map in several directions and add the results up (VMamba, section 4.2, SS2D).

    Every direction has its own steps, state matrix and projections and reads the same map; because the
    projections are pointwise, all tensors lie in pixel order, channels innermost. The state, A and the steps
    are float32 (float64 for float64 input) whatever autocast says; x, delta, B and C may be bfloat16 or
    float16. Scripts and traces.

    Args:
        x: map, (B, H, W, D), shared by the K directions.
        delta: steps before bias and softplus, (B, H, W, K, D).
        A: state matrices, negative, (K, D, N).
        B: input projections, (B, H, W, K, N).
        C: output projections, (B, H, W, K, N).
        D: skips, (K, D).
        delta_bias: added to delta, (K, D).
        delta_softplus: pass the steps through softplus.
        order: registered scan order with K directions: "cross2d" (rows, columns, rows from the end, columns
            from the end), "unidirectional" (rows, four times), "bidirectional" (rows twice, rows from the end
            twice), or one added with `register_scan_order`.
        backend: "auto" (by the device of `x`), or one of `lightspine.ops.dispatch.available_backends()`.
        keep: note a few states for the backward, which otherwise finds them by one more walk.

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
    # A script compiles no alternative of this condition; the two must not be joined by `and`.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif backend == "reference" or torch.onnx.is_in_onnx_export():
        return _plain(CrossScanInputs(x, delta, A, B, C, D, delta_bias), delta_softplus, order, backend)
    keep = keep and torch.is_grad_enabled()
    out, _ = torch.ops.lightspine.cross_scan(
        x, delta, A, B, C, D, delta_bias, delta_softplus, order, keep, backend
    )
    return out


def _plain(inputs: CrossScanInputs, delta_softplus: bool, order: str, backend: str) -> Tensor:
    check_inputs(inputs)
    if choose_backend(inputs.x.device.type, inputs.x.dtype, True, backend) == "reference":
        check_directions(inputs.A.shape[0], scan_order(order, *inputs.x.shape[1:3]).shape[0], order)
        return cross_scan_reference(*inputs, delta_softplus, order)
    return torch_backend.forward(inputs, delta_softplus, order, run=exported_scan)
