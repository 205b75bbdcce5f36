"""What stands for the scan operators in a file: a loop of ONNX operators, or steps written out one by one.

`torch.export` keeps a scan as one node. Each table here maps the operators to functions that are traced in
their place (`ExportedProgram.run_decompositions`).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.export.grouped_scan_function import FUNCTION_DOMAIN, grouped_name, sequence_name
from lightspine.ops.cross_scan import torch_backend as cross_backend
from lightspine.ops.cross_scan.checks import CrossScanInputs
from lightspine.ops.grouped_scan.torch_unrolled import unrolled_scan
from lightspine.ops.selective_scan import torch_backend as selective_backend
from lightspine.ops.selective_scan.checks import ScanInputs

ScanForm = Literal["loop", "unrolled"]
Table = dict[Any, Callable[..., Any]]


def scan_table(form: ScanForm) -> Table:
    """Return the functions that replace the scan operators of an exported program.

    Args:
        form: "loop" calls a function of `grouped_scan_function`, for any size of image; "unrolled" has no
            loop and needs a fixed size.
    """
    if form == "loop":
        return {
            torch.ops.lightspine.cross_scan.default: _cross_scan_loop,
            torch.ops.lightspine.selective_scan.default: _selective_scan_loop,
        }
    return {
        torch.ops.lightspine.cross_scan.default: _cross_scan_unrolled,
        torch.ops.lightspine.selective_scan.default: _selective_scan_unrolled,
    }


# An operator gives the states that its backward reads as well; an export has no backward.


def _cross_scan_loop(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    keep: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    height, width = x.shape[1], x.shape[2]
    y = _call(
        grouped_name(A.shape[2], delta_softplus),
        x.flatten(1, 2).unsqueeze(2),
        delta.flatten(1, 2),
        _or_zeros(delta_bias, A),
        A,
        B.flatten(1, 2),
        C.flatten(1, 2),
        _visits(order, height, width, x.device),
    ).unflatten(1, (height, width))
    if D is not None:
        y = y + x * D.sum(0)
    return y, y.new_empty(0)


def _selective_scan_loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    groups = B.shape[1]
    if groups != 1:
        raise UsageError(f"a selective scan in a loop has one group of channels in an export, got {groups}")
    x = u.transpose(1, 2)
    y = _call(
        sequence_name(reverse, delta_softplus),
        x,
        delta.transpose(1, 2),
        _or_zeros(None if delta_bias is None else delta_bias[None], A[None]),
        A[None],
        B[:, 0].transpose(1, 2),
        C[:, 0].transpose(1, 2),
    )
    if D is not None:
        y = y + x * D
    if z is not None:
        y = y * F.silu(z.transpose(1, 2))
    return y.transpose(1, 2), y.new_empty(u.shape[0], *A.shape), y.new_empty(0)


def _call(name: str, x: Tensor, *others: Tensor) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{FUNCTION_DOMAIN}::{name}",
        (x, *others),
        dtype=torch.float32,
        shape=(x.shape[0], x.shape[1], x.shape[-1]),
        version=1,
    )
    return result


def _or_zeros(bias: Tensor | None, A: Tensor) -> Tensor:
    return torch.zeros(A.shape[:2], device=A.device) if bias is None else bias


def _visits(
    order: str, height: int | torch.SymInt, width: int | torch.SymInt, device: torch.device
) -> Tensor:
    """Return the pixels that each direction visits, (K, height * width), for a size that may be free."""
    rows = torch.arange(height * width, device=device)
    if order == "cross2d":
        columns = rows.unflatten(0, (height, width)).t().reshape(-1)
        return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])
    if order == "unidirectional":
        return rows.expand(4, -1)
    if order == "bidirectional":
        return torch.stack([rows, rows, rows.flip(0), rows.flip(0)])
    raise UsageError(
        f"expected a scan order among cross2d, unidirectional and bidirectional to export, got {order!r}"
    )


def _cross_scan_unrolled(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    keep: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    if order != "cross2d":
        raise UsageError(f"expected the scan order cross2d to write out its steps, got {order!r}")
    inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
    y = cross_backend.forward(inputs, delta_softplus, order, run=unrolled_scan)
    return y, y.new_empty(0)


def _selective_scan_unrolled(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    y, state = selective_backend.forward(inputs, delta_softplus, reverse, run=unrolled_scan)
    return y, state, y.new_empty(0)
