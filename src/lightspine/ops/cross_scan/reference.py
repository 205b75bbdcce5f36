"""The multi-directional image scan as it is defined: gather, scan each direction, scatter back, sum."""

import torch
from torch import Tensor

from lightspine.ops.scan_orders import scan_order
from lightspine.ops.selective_scan.reference import selective_scan_reference


def cross_scan_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    order: str = "cross2d",
) -> Tensor:
    """Define the operator (VMamba, section 4.2); every backend is judged against this function.

    Args:
        x: map, (B, H, W, D), shared by the K directions.
        delta: steps in pixel order before bias and softplus, (B, H, W, K, D).
        A: state matrices, negative, (K, D, N).
        B: input projections in pixel order, (B, H, W, K, N).
        C: output projections in pixel order, (B, H, W, K, N).
        D: skips, (K, D).
        delta_bias: added to delta, (K, D).
        delta_softplus: pass the steps through softplus.
        order: registered scan order with K directions.

    Returns:
        The sum over directions, (B, H, W, D), float32 for reduced-precision input, else the dtype of `x`.
    """
    batch, height, width, dim = x.shape
    groups, length = delta.shape[3], height * width
    pixels = scan_order(order, height, width).to(x.device)  # (K, L)
    out_dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(batch, length, dim, dtype=out_dtype, device=x.device)
    for k in range(groups):
        index = pixels[k]
        scanned, _ = selective_scan_reference(
            x.reshape(batch, length, dim)[:, index].transpose(1, 2).to(out_dtype),
            delta[:, :, :, k].reshape(batch, length, dim)[:, index].transpose(1, 2),
            A[k],
            B[:, :, :, k].reshape(batch, length, -1)[:, index].transpose(1, 2)[:, None],
            C[:, :, :, k].reshape(batch, length, -1)[:, index].transpose(1, 2)[:, None],
            None if D is None else D[k],
            None,
            None if delta_bias is None else delta_bias[k],
            delta_softplus,
        )
        total = total.index_add(1, index, scanned.transpose(1, 2))
    return total.view(batch, height, width, dim)
