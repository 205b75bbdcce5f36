"""Scan orders: in which order each direction visits the pixels of a map."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightspine.errors import UsageError

OrderFn = Callable[[int, int], Tensor]

_ORDERS: dict[str, OrderFn] = {}


def register_scan_order(name: str, order: OrderFn) -> None:
    """Register a scan order under a name that `cross_scan(order=...)` takes.

    Args:
        name: new name.
        order: `order(height, width) -> (K, height * width)` integer tensor; row k lists the pixels h * width + w
            in the order in which direction k visits them, each exactly once.

    Raises:
        UsageError: the name is taken.
    """
    if name in _ORDERS:
        raise UsageError(f"the scan order {name!r} is already registered")
    _ORDERS[name] = order


def list_scan_orders() -> list[str]:
    """Return the names of all registered scan orders."""
    return list(_ORDERS)


def scan_order(name: str, height: int, width: int) -> Tensor:
    """Return the (K, height * width) pixel indices of a registered order.

    Raises:
        UsageError: no order has this name.
    """
    if name not in _ORDERS:
        raise UsageError(f"unknown scan order {name!r}: expected one of {', '.join(_ORDERS)}")
    return _ORDERS[name](height, width)


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
