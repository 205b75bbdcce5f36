"""The scan over a map by the Triton kernels: every direction walks the map where it lies."""

import functools

import torch
from torch import Tensor

from lightspine.ops.cross_scan.checks import CrossScanInputs, check_directions
from lightspine.ops.scan_orders import scan_order
from lightspine.ops.triton.launch import GroupedInputs, grouped_scan, grouped_scan_backward


def forward(inputs: CrossScanInputs, delta_softplus: bool, order: str) -> Tensor:
    """Return the sum over the directions, (B, H, W, D), in the dtype of the state."""
    x, groups = inputs.x, inputs.A.shape[0]
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    grouped_scan(_grouped(inputs, delta_softplus, order), _shared(out, groups))
    return out


def backward(grad_out: Tensor, inputs: CrossScanInputs, delta_softplus: bool, order: str) -> CrossScanInputs:
    """Return the gradients of all inputs, in their shapes and dtypes."""
    x, delta, A, B, C, D, delta_bias = inputs
    # The directions are added up in the precision of the state and rounded once.
    grad_x = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    grads, _ = grouped_scan_backward(
        _shared(grad_out, A.shape[0]),
        None,
        _grouped(inputs, delta_softplus, order),
        _shared(grad_x, A.shape[0]),
    )
    return CrossScanInputs(
        grad_x.to(x.dtype),
        grads.delta.view(delta.shape),
        grads.A.to(A.dtype),
        grads.B.view(B.shape).to(B.dtype),
        grads.C.view(C.shape).to(C.dtype),
        None if D is None or grads.D is None else grads.D.to(D.dtype),
        None if delta_bias is None or grads.delta_bias is None else grads.delta_bias.to(delta_bias.dtype),
    )


def _grouped(inputs: CrossScanInputs, delta_softplus: bool, order: str) -> GroupedInputs:
    x, delta, A, B, C, D, delta_bias = inputs
    pixels = scan_order(order, x.shape[1], x.shape[2])
    check_directions(A.shape[0], pixels.shape[0], order)
    return GroupedInputs(
        _shared(x, A.shape[0]),
        _adjacent(delta).flatten(1, 2),
        A,
        B.flatten(1, 2),
        C.flatten(1, 2),
        D,
        None,
        delta_bias,
        delta_softplus,
        False,
        _on_device(pixels, x.device),
    )


# Keyed by the tensor, not by the order's name: `scan_order` returns one tensor per name and size.
@functools.lru_cache(maxsize=64)
def _on_device(pixels: Tensor, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may record gradients
        return pixels.to(device, torch.int32)


def _shared(t: Tensor, groups: int) -> Tensor:
    """(B, H, W, D) -> (B, L, K, D) that all groups share, channels adjacent."""
    return _adjacent(t).flatten(1, 2)[:, :, None].expand(-1, -1, groups, -1)


def _adjacent(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
