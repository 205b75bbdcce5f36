"""Single rows and columns of the matrix that a selective scan applies to its input.

With the steps dt after softplus and S_t their sum up to t, the output of a scan at position i is

    y_i = sum_{j <= i} W_ij x_j,   W_ij = sum_n C_in exp(A_n (S_i - S_j)) dt_j B_jn   (+ D where i = j)

for every channel by itself (Mamba, section 3.2, the recurrence multiplied out). One row or column costs as
much memory as the input; the L x L matrix is never made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.analysis.recording import OperatorCall
from lightspine.errors import UsageError
from lightspine.ops.scan_orders import scan_order

_CROSS2D = ("rows, ahead", "columns, ahead", "rows, back", "columns, back")


@dataclass(frozen=True)
class DirectedScan:
    """One direction of a scan of one image; all tensors in float64 and in the order of the walk.

    Attributes:
        label: what figures call the direction.
        positions: (L,), the place in the map or sequence that each step of the walk visits.
        x: input, (L, D).
        dt: steps after bias and softplus, (L, D).
        A: (D, N), negative.
        B: (L, G, N); channel d reads group d // (D / G).
        C: (L, G, N).
        skip: (D,); zeros without one.
        gate: (L, D), what the output is multiplied by; ones without one.
    """

    label: str
    positions: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    skip: Tensor
    gate: Tensor


def reads_of(scan: DirectedScan, place: int, *, skip: bool = True) -> Tensor:
    """Return row `place`: what the output there takes from every place, (L, D) by place, not by walk.

    Args:
        scan: one direction.
        place: in the map or sequence, from 0.
        skip: with D, by which a place reads itself past the state; the row then gives the output exactly.
    """
    step = _step_of(scan, place)
    weights = _weights(scan, torch.tensor([step]), torch.arange(step + 1))
    if skip:
        weights[step] += scan.skip
    return _by_place(scan, weights * scan.gate[step], slice(0, step + 1))


def readers_of(scan: DirectedScan, place: int, *, skip: bool = True) -> Tensor:
    """Return column `place`: what the output of every place takes from there, (L, D) by place.

    The arguments are those of `reads_of`.
    """
    step = _step_of(scan, place)
    length = len(scan.positions)
    weights = _weights(scan, torch.arange(step, length), torch.tensor([step]))
    if skip:
        weights[0] += scan.skip
    return _by_place(scan, weights * scan.gate[step:], slice(step, length))


def _step_of(scan: DirectedScan, place: int) -> int:
    return int((scan.positions == place).nonzero())


def _weights(scan: DirectedScan, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return W for one output and many inputs, or one input and many outputs, (max of both, D)."""
    sums = scan.dt.cumsum(0)
    # At most 0 after the product with A: the exponential cannot overflow.
    passed = sums[outputs] - sums[inputs]
    total = torch.zeros_like(passed)
    repeat = scan.x.shape[1] // scan.B.shape[1]
    # One state at a time: memory of one map, whatever N.
    for n in range(scan.A.shape[1]):
        kept = torch.exp(passed * scan.A[:, n])
        projections = scan.C[outputs, :, n] * scan.B[inputs, :, n]
        total += kept * projections.repeat_interleave(repeat, dim=1)
    return total * scan.dt[inputs]


def _by_place(scan: DirectedScan, weights: Tensor, steps: slice) -> Tensor:
    found = weights.new_zeros(scan.x.shape)
    found[scan.positions[steps]] = weights
    return found


def directed_scans(call: OperatorCall) -> list[DirectedScan]:
    """Return the directions of a recorded scan of one image.

    Raises:
        UsageError: the call was no scan, or of more than one image.
    """
    if call.args[0].shape[0] != 1:
        raise UsageError(f"expected the scan of one image, got {call.args[0].shape[0]}")
    if call.kind == "cross_scan":
        return _of_cross_scan(*call.args[:9])
    if call.kind == "selective_scan":
        return [_of_selective_scan(*call.args[:10])]
    raise UsageError(f"expected a scan, got {call.kind} attention of {call.module}")


def _of_cross_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    order: str,
) -> list[DirectedScan]:
    _, height, width, dim = x.shape
    pixels = scan_order(order, height, width)
    labels: Sequence[str] = _CROSS2D if order == "cross2d" else [f"direction {k}" for k in range(len(pixels))]
    found = []
    for k, (label, positions) in enumerate(zip(labels, pixels, strict=True)):
        bias = None if delta_bias is None else delta_bias[k]
        steps = _steps(delta[0, :, :, k].flatten(0, 1).cpu()[positions], bias, softplus)
        flat = _wide(x[0].flatten(0, 1))[positions]
        found.append(
            DirectedScan(
                label,
                positions,
                x=flat,
                dt=steps,
                A=_wide(A[k]),
                B=_wide(B[0, :, :, k].flatten(0, 1))[positions][:, None],
                C=_wide(C[0, :, :, k].flatten(0, 1))[positions][:, None],
                skip=flat.new_zeros(dim) if D is None else _wide(D[k]),
                gate=torch.ones_like(flat),
            )
        )
    return found


def _of_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> DirectedScan:
    length = u.shape[2]
    positions = torch.arange(length)
    positions = positions.flip(0) if reverse else positions
    x = _wide(u[0].t())[positions]
    return DirectedScan(
        "back" if reverse else "ahead",
        positions,
        x=x,
        dt=_steps(delta[0].t().cpu()[positions], delta_bias, softplus),
        A=_wide(A),
        B=_wide(B[0].permute(2, 0, 1))[positions],
        C=_wide(C[0].permute(2, 0, 1))[positions],
        skip=x.new_zeros(x.shape[1]) if D is None else _wide(D),
        gate=torch.ones_like(x) if z is None else F.silu(_wide(z[0].t())[positions]),
    )


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    steps = _wide(delta) if bias is None else _wide(delta) + _wide(bias)
    return F.softplus(steps) if softplus else steps


def _wide(values: Tensor) -> Tensor:
    # One row is little work: on the CPU in float64, the multiplied-out form is as exact as the recurrence.
    return values.to("cpu", torch.float64)
