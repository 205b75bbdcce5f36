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
            + w in the sequence in which direction k visits them, each exactly once. An export with dynamic
            image sizes traces it with symbolic sizes, so it must then consist of PyTorch operations that do
            not convert the sizes to Python integers.

    Raises:
        UsageError: the name is taken.
    """
    if name in _ORDERS:
        raise UsageError(f"the scan order {name!r} is already registered")
    _ORDERS[name] = order


def list_scan_orders() -> list[str]:
    """Return the names of all registered scan orders."""
    return list(_ORDERS)


def scan_order(name: str, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    """Return the pixel indices of a registered order, (K, height * width) int64 on the CPU; do not modify.

    For symbolic sizes (dynamic axes of an export), the order is traced instead of a constant.

    Raises:
        UsageError: no order has this name, a row does not visit every pixel exactly once, or the order cannot
            be traced with symbolic sizes.
    """
    if isinstance(height, int) and isinstance(width, int):
        return _validated_order(name, height, width)
    return _traced_order(name, height, width)


@functools.lru_cache(maxsize=64)
def _validated_order(name: str, height: int, width: int) -> Tensor:
    order_fn = _find_order(name)
    # On the CPU while a model is built on the meta device, with real numbers in a trace, and never an
    # inference tensor, which later training could not use.
    with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False):
        order = order_fn(height, width).to("cpu", torch.int64).contiguous()
        _check_order(name, order, height, width)
    return order


def _check_order(name: str, order: Tensor, height: int, width: int) -> None:
    pixels = height * width
    if order.dim() != 2 or order.shape[0] == 0 or order.shape[1] != pixels:
        raise UsageError(
            f"scan order {name!r}: expected indices of shape (K, {pixels}) for a {height}x{width} map, "
            f"received {tuple(order.shape)}"
        )
    for k, row in enumerate(order.sort(dim=1).values):
        if not torch.equal(row, torch.arange(pixels)):
            raise UsageError(
                f"scan order {name!r}: expected direction {k} to visit each of the {pixels} pixels of a "
                f"{height}x{width} map exactly once, received a row that does not"
            )


def _traced_order(name: str, height: Any, width: Any) -> Tensor:
    order_fn, cause = _find_order(name), None
    try:
        order = order_fn(height, width)
        # A number here means that the sizes of the example were read from the symbols.
        traced = not isinstance(order.shape[-1], int)
    except Exception as error:  # whatever the registered function raises
        traced, cause = False, error
    if not traced:
        raise UsageError(
            f"the scan order {name!r} cannot be exported with free image sizes, because PyTorch cannot trace "
            "it with symbolic sizes: export with a fixed size"
        ) from cause
    return order


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
