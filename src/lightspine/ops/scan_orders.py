"""Scan orders: the sequence in which each direction of `cross_scan` visits the pixels of a feature map."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightspine.errors import UsageError

OrderFn = Callable[[Any, Any], Tensor]

_ORDERS: dict[str, OrderFn] = {}


def register_scan_order(name: str, order: OrderFn) -> None:
    """Register a scan order for `cross_scan(order=name)`, on every backend and in every export.

    Args:
        name: new name.
        order: `order(height, width) -> (K, height * width)` integer tensor; row k lists the pixels h * width
            + w in the sequence in which direction k visits them, each exactly once. An export with free image
            sizes traces it with symbolic sizes, so it then has to consist of PyTorch operations that do not
            convert the sizes to Python integers.

    Raises:
        UsageError: the name is taken.
    """
    if name in _ORDERS:
        raise UsageError(f"the scan order {name!r} is already registered")
    _ORDERS[name] = order


def list_scan_orders() -> list[str]:
    """Return the names of all registered scan orders."""
    return list(_ORDERS)


@functools.lru_cache(maxsize=64)
def scan_order(name: str, height: int, width: int) -> Tensor:
    """Return the pixel indices of a registered order, (K, height * width) int64 on the CPU; do not modify.

    Raises:
        UsageError: no order has this name, or a row does not visit every pixel exactly once.
    """
    order_fn = _find_order(name)
    # On the CPU while a model is built on the meta device, and never an inference tensor, which later
    # training could not use.
    with torch.device("cpu"), torch.inference_mode(False):
        order = order_fn(height, width)
        order = order.to("cpu", torch.int64).contiguous()
    pixels = height * width
    if order.dim() != 2 or order.shape[0] == 0 or order.shape[1] != pixels:
        raise UsageError(
            f"scan order {name!r}: expected indices of shape (K, {pixels}) for a {height}x{width} map, "
            f"received {tuple(order.shape)}"
        )
    for k, row in enumerate(order.sort(dim=1).values):
        if not torch.equal(row, torch.arange(pixels, device="cpu")):
            raise UsageError(
                f"scan order {name!r}: expected direction {k} to visit each of the {pixels} pixels of a "
                f"{height}x{width} map exactly once, received a row that does not"
            )
    return order


def trace_scan_order(
    name: str, height: int | torch.SymInt, width: int | torch.SymInt, device: torch.device
) -> Tensor:
    """Return `scan_order` inside an export: a constant, or operations on the symbolic sizes of a free axis.

    Raises:
        UsageError: as `scan_order`, or the order cannot be traced with symbolic sizes.
    """
    order_fn = _find_order(name)
    if isinstance(height, int) and isinstance(width, int):
        with _disable_current_modes():
            order = scan_order(name, height, width)
            pixels = order.tolist()
        return torch.tensor(pixels, device=device)
    with torch.device(device):
        traced = order_fn(height, width)
    return traced


def _find_order(name: str) -> OrderFn:
    if name not in _ORDERS:
        raise UsageError(f"unknown scan order {name!r}: expected one of {', '.join(_ORDERS)}")
    return _ORDERS[name]


def _cross2d(height: int, width: int) -> Tensor:
    rows = torch.arange(height * width)
    columns = rows.view(height, width).t().reshape(-1)
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def _unidirectional(height: int, width: int) -> Tensor:
    return torch.arange(height * width).expand(4, -1)


def _bidirectional(height: int, width: int) -> Tensor:
    rows = torch.arange(height * width)
    return torch.stack([rows, rows, rows.flip(0), rows.flip(0)])


register_scan_order("cross2d", _cross2d)
register_scan_order("unidirectional", _unidirectional)
register_scan_order("bidirectional", _bidirectional)
