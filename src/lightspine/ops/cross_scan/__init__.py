"""The multi-directional image scan of SS2D: one map in, one map out."""

from torch import Tensor

from lightspine.ops.cross_scan.reference import cross_scan_reference


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
) -> Tensor:
    """Run the selective scan over a map in several directions and add the results up."""
    return cross_scan_reference(x, delta, A, B, C, D, delta_bias, delta_softplus, order)
