"""Rows and columns of attention matrices: the implicit ones of selective scans, and softmax attention.

Let dt be the step sizes after softplus and S_t their cumulative sum. The output of a scan at position i is

    y_i = sum_{j <= i} W_ij x_j,   W_ij = sum_n C_in exp(A_n (S_i - S_j)) dt_j B_jn   (+ D if i = j)

for each channel (the unrolled recurrence of Mamba, section 3.2). One row or column of W takes as much memory
as the input; the L x L matrix is never computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.analysis.op_recorder import OpCall
from lightspine.errors import UsageError
from lightspine.ops.scan_orders import scan_order

_CROSS2D = ("rows, ahead", "columns, ahead", "rows, back", "columns, back")


@dataclass(frozen=True)
class DirectedScan:
    """One direction of a scan over one image; all tensors are float64 and in scan order.

    Attributes:
        label: name of the direction in figures.
        positions: (L,), index in the map or sequence that each scan step visits.
        x: input, (L, D).
        dt: step sizes after bias and softplus, (L, D).
        A: (D, N), negative.
        B: (L, G, N); channel d uses group d // (D / G).
        C: (L, G, N).
        skip: the skip connection D, (D,); zeros if there is none.
        gate: factor of the output, (L, D); ones if there is none.
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


def scan_row(scan: DirectedScan, position: int, *, skip: bool = True) -> Tensor:
    """Return row `position` of W: the weights of all inputs in the output at this position.

    Args:
        scan: one direction of a scan.
        position: index in the map or sequence.
        skip: include the skip connection D on the diagonal; the row then reproduces the output exactly.

    Returns:
        (L, D), in the order of the map or sequence.
    """
    step = _scan_step(scan, position)
    weights = _weights(scan, torch.tensor([step]), torch.arange(step + 1))
    if skip:
        weights[step] += scan.skip
    return _in_map_order(scan, weights * scan.gate[step], slice(0, step + 1))


def scan_column(scan: DirectedScan, position: int, *, skip: bool = True) -> Tensor:
    """Return column `position` of W: the weights of this input in all outputs; see `scan_row`."""
    step = _scan_step(scan, position)
    length = len(scan.positions)
    weights = _weights(scan, torch.arange(step, length), torch.tensor([step]))
    if skip:
        weights[0] += scan.skip
    return _in_map_order(scan, weights * scan.gate[step:], slice(step, length))


def _scan_step(scan: DirectedScan, position: int) -> int:
    return int((scan.positions == position).nonzero())


def _weights(scan: DirectedScan, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return W for one output and several inputs, or one input and several outputs, (max of both, D)."""
    sums = scan.dt.cumsum(0)
    # Not negative, and A is negative, so the exponential below cannot overflow.
    passed = sums[outputs] - sums[inputs]
    total = torch.zeros_like(passed)
    repeat = scan.x.shape[1] // scan.B.shape[1]
    # A loop over the states bounds memory to one map.
    for n in range(scan.A.shape[1]):
        kept = torch.exp(passed * scan.A[:, n])
        projections = scan.C[outputs, :, n] * scan.B[inputs, :, n]
        total += kept * projections.repeat_interleave(repeat, dim=1)
    return total * scan.dt[inputs]


def _in_map_order(scan: DirectedScan, weights: Tensor, steps: slice) -> Tensor:
    found = weights.new_zeros(scan.x.shape)
    found[scan.positions[steps]] = weights
    return found


def directed_scans(call: OpCall) -> list[DirectedScan]:
    """Return the directions of a recorded scan over one image.

    Raises:
        UsageError: the call is not a scan, or has more than one image.
    """
    if call.args[0].shape[0] != 1:
        raise UsageError(f"expected a scan of one image, got {call.args[0].shape[0]} images")
    if call.kind == "cross_scan":
        return _cross_scan_directions(*call.args[:9])
    if call.kind == "selective_scan":
        return [_selective_scan_direction(*call.args[:10])]
    raise UsageError(f"expected a scan, got {call.kind} attention of {call.module}")


def _cross_scan_directions(
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
        steps = _step_sizes(delta[0, :, :, k].flatten(0, 1).cpu()[positions], bias, softplus)
        flat = _to_float64(x[0].flatten(0, 1))[positions]
        found.append(
            DirectedScan(
                label,
                positions,
                x=flat,
                dt=steps,
                A=_to_float64(A[k]),
                B=_to_float64(B[0, :, :, k].flatten(0, 1))[positions][:, None],
                C=_to_float64(C[0, :, :, k].flatten(0, 1))[positions][:, None],
                skip=flat.new_zeros(dim) if D is None else _to_float64(D[k]),
                gate=torch.ones_like(flat),
            )
        )
    return found


def _selective_scan_direction(
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
    x = _to_float64(u[0].t())[positions]
    return DirectedScan(
        "back" if reverse else "ahead",
        positions,
        x=x,
        dt=_step_sizes(delta[0].t().cpu()[positions], delta_bias, softplus),
        A=_to_float64(A),
        B=_to_float64(B[0].permute(2, 0, 1))[positions],
        C=_to_float64(C[0].permute(2, 0, 1))[positions],
        skip=x.new_zeros(x.shape[1]) if D is None else _to_float64(D),
        gate=torch.ones_like(x) if z is None else F.silu(_to_float64(z[0].t())[positions]),
    )


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    steps = _to_float64(delta) if bias is None else _to_float64(delta) + _to_float64(bias)
    return F.softplus(steps) if softplus else steps


def _to_float64(values: Tensor) -> Tensor:
    # The unrolled recurrence needs float64 to be as accurate as the scan.
    return values.to("cpu", torch.float64)


def softmax_rows(call: OpCall, queries: Tensor | None = None) -> Tensor:
    """Return rows of the softmax attention matrices of one image.

    Args:
        call: a recorded softmax attention.
        queries: indices of the rows, (Q,); all by default.

    Returns:
        (heads, Q, number of keys), float32; each row sums to 1.

    Raises:
        UsageError: the call is a scan, is causal, or splits the image into windows.
    """
    if call.kind != "softmax":
        raise UsageError(f"expected softmax attention, got the scan of {call.module}")
    query, key = call.args[0], call.args[1]
    mask = call.kwargs.get("attn_mask", call.args[3] if len(call.args) > 3 else None)
    if call.kwargs.get("is_causal", False) or query.shape[0] != 1:
        raise UsageError(
            f"expected attention over a whole image, got {query.shape[0]} windows or a causal mask "
            f"in {call.module}"
        )
    # SHViT's single head has no head axis.
    query, key = (tensor.unsqueeze(1) if tensor.dim() == 3 else tensor for tensor in (query, key))
    if query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if queries is not None:
        query = query[:, :, queries.to(query.device)]
    scale = call.kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    scores = scale * query.float() @ key.float().transpose(2, 3)
    if mask is not None:
        mask = mask.expand(1, query.shape[1], call.args[0].shape[-2], key.shape[2])
        mask = mask if queries is None else mask[:, :, queries.to(mask.device)]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)[0].cpu()
