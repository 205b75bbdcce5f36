"""The scan over a map by the blocked scan in standard PyTorch operations: any device, any exporter.

The K directions are brought into scan order side by side, so that one blocked scan serves them all.
"""

import torch
from torch import Tensor

from lightspine.ops.cross_scan.checks import CrossScanInputs, check_directions
from lightspine.ops.scan_orders import scan_order
from lightspine.ops.torch_scan import GroupedScan, blocked_scan, blocked_scan_backward


def forward(
    inputs: CrossScanInputs, delta_softplus: bool, order: str, run: GroupedScan = blocked_scan
) -> Tensor:
    """Return the sum over the directions, (B, H, W, D), in the dtype of the state."""
    y, _ = run(*_in_scan_order(inputs, order), delta_softplus)
    return _merge(y, order, *inputs.x.shape[1:3])


def backward(grad_out: Tensor, inputs: CrossScanInputs, delta_softplus: bool, order: str) -> CrossScanInputs:
    """Return the gradients of all inputs, in their shapes and dtypes."""
    x, delta, A, B, C, D, delta_bias = inputs
    height, width = x.shape[1:3]
    arguments = _in_scan_order(inputs, order)
    grad_y = _walk_map(grad_out.to(arguments[0].dtype), A.shape[0], order)
    no_state = torch.zeros(x.shape[0], *A.shape, dtype=grad_y.dtype, device=x.device)
    grads = blocked_scan_backward(grad_y, no_state, *arguments, delta_softplus)
    return CrossScanInputs(
        _merge(grads.x, order, height, width).to(x.dtype),
        _to_pixels(grads.delta, order, height, width).to(delta.dtype),
        grads.A.to(A.dtype),
        _to_pixels(grads.B, order, height, width).to(B.dtype),
        _to_pixels(grads.C, order, height, width).to(C.dtype),
        None if grads.D is None or D is None else grads.D.to(D.dtype),
        None if grads.delta_bias is None or delta_bias is None else grads.delta_bias.to(delta_bias.dtype),
    )


def _in_scan_order(
    inputs: CrossScanInputs, order: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    x, delta, A, B, C, D, delta_bias = inputs
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        _walk_map(x.to(dtype), A.shape[0], order),
        _walk(delta.to(dtype), order),
        A.to(dtype),
        _walk(B.to(dtype), order),
        _walk(C.to(dtype), order),
        None if D is None else D.to(dtype),
        None if delta_bias is None else delta_bias.to(dtype),
    )


def _walk_map(x: Tensor, directions: int, order: str) -> Tensor:
    """(B, H, W, X) -> (B, L, K, X): what each direction meets on its way."""
    return _walk(x[:, :, :, None].expand(-1, -1, -1, directions, -1), order)


def _walk(t: Tensor, order: str) -> Tensor:
    """(B, H, W, K, X) -> (B, L, K, X): each direction's part of `t` in the order of its visits."""
    height, width, groups = t.shape[1:4]
    if order == "cross2d":
        # Flips and transposes are several times faster than an index, and every exporter knows them.
        check_directions(groups, 4, order)
        rows, columns, rows_back, columns_back = t.unbind(3)
        walks = [rows, columns.transpose(1, 2), rows_back.flip(1, 2), columns_back.transpose(1, 2).flip(1, 2)]
        return torch.stack([walk.flatten(1, 2) for walk in walks], dim=2)
    pixels = scan_order(order, height, width).to(t.device)
    check_directions(groups, pixels.shape[0], order)
    return t.flatten(1, 2)[:, pixels.t(), torch.arange(groups, device=t.device)]


def _to_pixels(t: Tensor, order: str, height: int, width: int) -> Tensor:
    """(B, L, K, X) -> (B, H, W, K, X): the inverse of `_walk`."""
    if order == "cross2d":
        return torch.stack(_cross2d_maps(t, height, width), dim=3)
    pixels = scan_order(order, height, width).to(t.device)
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    out[:, pixels.t(), torch.arange(t.shape[2], device=t.device)] = t
    return out.unflatten(1, (height, width))


def _merge(t: Tensor, order: str, height: int, width: int) -> Tensor:
    """(B, L, K, X) -> (B, H, W, X): send every direction back to its pixels and add them up."""
    if order == "cross2d":
        rows, columns, rows_back, columns_back = _cross2d_maps(t, height, width)
        return (rows + rows_back) + (columns + columns_back)
    pixels = scan_order(order, height, width).to(t.device)
    total = t.new_zeros(t.shape[0], height * width, t.shape[3])
    total.index_add_(1, pixels.t().flatten(), t.flatten(1, 2))
    return total.unflatten(1, (height, width))


def _cross2d_maps(t: Tensor, height: int, width: int) -> list[Tensor]:
    rows, columns, rows_back, columns_back = t.unbind(2)
    return [
        rows.unflatten(1, (height, width)),
        columns.unflatten(1, (width, height)).transpose(1, 2),
        rows_back.unflatten(1, (height, width)).flip(1, 2),
        columns_back.unflatten(1, (width, height)).flip(1, 2).transpose(1, 2),
    ]
