"""Scan orders: in which order each direction visits the pixels of a map."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lightspine.errors import UsageError

OrderFn = Callable[[int, int], Tensor]

_ORDERS: dict[str, OrderFn] = {}


def register_scan_order(name: str, order: OrderFn) -> None:
    """Register a scan order under a name that `cross_scan(order=...)` takes, on every backend.

    Args:
        name: new name.
        order: `order(height, width) -> (K, height * width)` integer tensor; row k lists the pixels h * width
            + w in the order in which direction k visits them, each exactly once.

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
    """Return the pixel indices of a registered order, (K, height * width) int64 on the CPU, read only.

    Raises:
        UsageError: no order has this name, or a row of it does not visit every pixel exactly once.
    """
    if name not in _ORDERS:
        raise UsageError(f"unknown scan order {name!r}: expected one of {', '.join(_ORDERS)}")
    # Also while a model is being built on the meta device, and not as a tensor of the inference mode, which a
    # later training could not use.
    with torch.device("cpu"), torch.inference_mode(False):
        order = _ORDERS[name](height, width)
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
