"""Scan operators: pure functions on tensors, each with a reference implementation and several backends."""

from lightspine.ops.bidirectional_scan import bidirectional_scan as bidirectional_scan
from lightspine.ops.causal_conv1d import causal_conv1d as causal_conv1d
from lightspine.ops.cross_scan import cross_scan as cross_scan
from lightspine.ops.dispatch import available_backends as available_backends
from lightspine.ops.scan_orders import list_scan_orders as list_scan_orders
from lightspine.ops.scan_orders import register_scan_order as register_scan_order
from lightspine.ops.scan_orders import scan_order as scan_order
from lightspine.ops.selective_scan import selective_scan as selective_scan

__all__ = [
    "available_backends",
    "bidirectional_scan",
    "causal_conv1d",
    "cross_scan",
    "list_scan_orders",
    "register_scan_order",
    "scan_order",
    "selective_scan",
]
