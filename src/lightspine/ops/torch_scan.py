"""The backend "torch": both scans in standard PyTorch operations, on any device and for any exporter.

There are three forms of the same recurrence, with the same arguments and results:

- `blocked_scan`: the sequence is cut into blocks of about sqrt(L) positions. One loop runs over the positions
  of a block, for all blocks at once, and one over the blocks: about 3 sqrt(L) small operations in place of L.
- `unrolled_scan`: the same without writing into tensors, for formats without loops, such as Core ML.
- `exported_scan`: PyTorch's higher-order `scan`, which exporters turn into a loop of any length.

The decay over a block is exp(A * sum of its dt). Nothing is divided by a running product of decays, which
underflows, so results are as exact as those of the plain loop.

Shapes: x and dt (B, L, K, D); A (K, D, N); B and C (B, L, K, N), all of one dtype and in scan order. Blocks
replace L by a block axis J and a position T within the block: (B, J, T, K, D).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan as higher_order_scan

from lightspine.ops.inputs import CrossScanInputs, SelectiveScanInputs, check_directions, state_dtype
from lightspine.ops.scan_orders import scan_order

ScanFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor]
]
"""Signature of `blocked_scan`, `unrolled_scan` and `exported_scan`."""


class _Sequences(NamedTuple):
    """Arguments of a scan form, or their gradients.

    Attributes:
        x: input, (B, L, K, D).
        delta: dt before bias and softplus, (B, L, K, D).
        A: state matrices, (K, D, N).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        D: skip connections, (K, D).
        delta_bias: added to delta, (K, D).
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


def blocked_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Scan K groups of channels block by block.

    Args:
        x: input, (B, L, K, D).
        delta: dt before bias and softplus, (B, L, K, D).
        A: state matrices, (K, D, N).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        D: skip connections, (K, D).
        delta_bias: added to delta, (K, D).
        delta_softplus: apply softplus to dt.

    Returns:
        The output (B, L, K, D) and the last state (B, K, D, N), in the dtype of the inputs.
    """
    length = x.shape[1]
    dt = _compute_dt(delta, delta_bias, delta_softplus)
    block = _block_length(length)
    dts, Bs, Cs = (_split_blocks(t, block) for t in (dt, B, C))
    inputs = _split_blocks(dt * x, block)
    state, last = _block_starts(inputs, dts, A, Bs)
    y = torch.empty_like(inputs)
    for t in range(block):
        decay = torch.exp(dts[:, :, t, ..., None] * A)
        state = decay * state + inputs[:, :, t, ..., None] * Bs[:, :, t, :, None]
        y[:, :, t] = (state * Cs[:, :, t, :, None]).sum(-1)
    y = y.flatten(1, 2)[:, :length]
    return (y if D is None else y + x * D), last


def blocked_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> _Sequences:
    """Return the gradients of `blocked_scan` for its arguments; the states are recomputed.

    Args:
        grad_y: gradient of the output, (B, L, K, D).
        grad_last: gradient of the last state, (B, K, D, N).
        x: like all that follow, as in the forward.
        delta: see x.
        A: see x.
        B: see x.
        C: see x.
        D: see x.
        delta_bias: see x.
        delta_softplus: see x.
    """
    length = x.shape[1]
    dt = _compute_dt(delta, delta_bias, delta_softplus)
    block = _block_length(length)
    dts, Bs, Cs, xs, grad_ys = (_split_blocks(t, block) for t in (dt, B, C, x, grad_y))

    inputs = dts * xs
    state, _ = _block_starts(inputs, dts, A, Bs)
    states = [state]
    for t in range(block):
        decay = torch.exp(dts[:, :, t, ..., None] * A)
        states.append(decay * states[-1] + inputs[:, :, t, ..., None] * Bs[:, :, t, :, None])

    # The gradient of the state follows the same recurrence in reverse: dh_t = C_t dy_t + decay_{t+1}
    # dh_{t+1}. `carried` is the second term.
    carried = _block_ends(grad_ys, grad_last, dts, A, Cs)
    grad_x, grad_dt = torch.empty_like(xs), torch.empty_like(xs)
    grad_B, grad_C = torch.empty_like(Bs), torch.empty_like(Cs)
    grad_A = torch.zeros_like(A)
    for t in range(block - 1, -1, -1):
        dt_t, x_t, grad_y_t = dts[:, :, t, ..., None], xs[:, :, t, ..., None], grad_ys[:, :, t, ..., None]
        grad_h = grad_y_t * Cs[:, :, t, :, None] + carried
        carried = grad_h * torch.exp(dt_t * A)
        grad_exponent = carried * states[t]  # of dt A
        grad_C[:, :, t] = (grad_y_t * states[t + 1]).sum(3)
        grad_B[:, :, t] = (grad_h * (dt_t * x_t)).sum(3)
        grad_A += (grad_exponent * dt_t).sum((0, 1))
        grad_input = (grad_h * Bs[:, :, t, :, None]).sum(-1)  # of dt x
        grad_x[:, :, t] = grad_input * dt_t[..., 0]
        grad_dt[:, :, t] = grad_input * x_t[..., 0] + (grad_exponent * A).sum(-1)

    grad_x, grad_dt, grad_B, grad_C = (t.flatten(1, 2)[:, :length] for t in (grad_x, grad_dt, grad_B, grad_C))
    if D is not None:
        grad_x = grad_x + grad_y * D
    if delta_softplus:
        grad_dt = grad_dt * torch.sigmoid(delta if delta_bias is None else delta + delta_bias)
    return _Sequences(
        grad_x,
        grad_dt,
        grad_A,
        grad_B,
        grad_C,
        None if D is None else (grad_y * x).sum((0, 1)),
        None if delta_bias is None else grad_dt.sum((0, 1)),
    )


def _compute_dt(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    dt = delta if delta_bias is None else delta + delta_bias
    return F.softplus(dt) if delta_softplus else dt


def _block_length(length: int) -> int:
    """Return the number of positions of a block, about the square root of the length."""
    blocks = max(1, round(math.sqrt(length)))
    return -(-length // blocks)


def _split_blocks(t: Tensor, block: int) -> Tensor:
    """(B, L, K, X) -> (B, J, T, K, X); padded with zeros, since dt = 0 keeps the state."""
    padding = -t.shape[1] % block
    if padding:
        t = F.pad(t, (0, 0, 0, 0, 0, padding))
    return t.unflatten(1, (-1, block))


def _block_starts(inputs: Tensor, dts: Tensor, A: Tensor, Bs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before each block, (B, J, K, D, N), and the last state, (B, K, D, N)."""
    batch, blocks, block = dts.shape[:3]
    # The last state of each block if its first state were zero.
    added = dts.new_zeros(batch, blocks, *A.shape)
    for t in range(block):
        added = torch.exp(dts[:, :, t, ..., None] * A) * added
        added = added + inputs[:, :, t, ..., None] * Bs[:, :, t, :, None]
    decay = torch.exp(dts.sum(2)[..., None] * A)
    state = torch.zeros_like(added[:, 0])
    starts = []
    for j in range(blocks):
        starts.append(state)
        state = decay[:, j] * state + added[:, j]
    return torch.stack(starts, 1), state


def _block_ends(grad_ys: Tensor, grad_last: Tensor, dts: Tensor, A: Tensor, Cs: Tensor) -> Tensor:
    """Return the gradient that the last state of each block receives from later blocks, (B, J, K, D, N)."""
    batch, blocks, block = dts.shape[:3]
    # The gradient that each block passes to the one before it if it received none.
    passed = dts.new_zeros(batch, blocks, *A.shape)
    for t in range(block - 1, -1, -1):
        passed = passed + grad_ys[:, :, t, ..., None] * Cs[:, :, t, :, None]
        passed = torch.exp(dts[:, :, t, ..., None] * A) * passed
    decay = torch.exp(dts.sum(2)[..., None] * A)
    grad = grad_last
    ends = []
    for j in range(blocks - 1, -1, -1):
        ends.append(grad)
        grad = decay[:, j] * grad + passed[:, j]
    return torch.stack(ends[::-1], 1)


def exported_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Scan K groups of channels with one `scan` node of any length; arguments and results of `blocked_scan`.

    Slow outside an exporter.
    """
    dt = _compute_dt(delta, delta_bias, delta_softplus)

    def scan_position(state: Tensor, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        dt_t, input_t, B_t, C_t = now  # (B, K, D) twice, (B, K, N) twice
        state = torch.exp(dt_t[..., None] * A) * state + input_t[..., None] * B_t[:, :, None]
        return state, (state * C_t[:, :, None]).sum(-1)

    # Scanned along the first axis; ONNX Runtime scans that one without a transpose.
    sequences = tuple(t.movedim(1, 0) for t in (dt, dt * x, B, C))
    start = torch.zeros_like(sequences[0][0])[..., None] * A
    last, y = higher_order_scan(scan_position, start, sequences)
    y = y.movedim(0, 1)
    return (y if D is None else y + x * D), last


def unrolled_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Scan K groups of channels of a fixed length without a loop; arguments and results of `blocked_scan`."""
    length = int(x.shape[1])
    dt = _compute_dt(delta, delta_bias, delta_softplus)
    block = _block_length(length)
    dts, Bs, Cs, inputs = (_split_blocks(t, block).unbind(2) for t in (dt, B, C, dt * x))  # (B, J, K, D or N)
    decays = [torch.exp(dt_t[..., None] * A) for dt_t in dts]
    writes = [input_t[..., None] * B_t[:, :, :, None] for input_t, B_t in zip(inputs, Bs, strict=True)]

    added, decay = writes[0], decays[0]
    for decay_t, write in zip(decays[1:], writes[1:], strict=True):
        added = decay_t * added + write
        decay = decay * decay_t
    state = torch.zeros_like(added[:, 0])
    starts = []
    for added_j, decay_j in zip(added.unbind(1), decay.unbind(1), strict=True):
        starts.append(state)
        state = decay_j * state + added_j

    last, state = state, torch.stack(starts, 1)
    outputs = []
    for decay_t, write, C_t in zip(decays, writes, Cs, strict=True):
        state = decay_t * state + write
        outputs.append((state * C_t[:, :, :, None]).sum(-1))
    y = torch.stack(outputs, 2).flatten(1, 2)[:, :length]
    return (y if D is None else y + x * D), last


def run_selective_scan(
    form: ScanFunction, inputs: SelectiveScanInputs, delta_softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the output (B, D, L) and the last state (B, D, N), computed by one of the scan forms."""
    y, state = form(*_sequences(inputs, reverse), delta_softplus)
    y = _from_sequence(y, reverse)
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(y.dtype))
    return y.to(inputs.u.dtype), state.flatten(1, 2)


def run_cross_scan(form: ScanFunction, inputs: CrossScanInputs, delta_softplus: bool, order: str) -> Tensor:
    """Return the sum over the directions, (B, H, W, D), computed by one of the scan forms."""
    y, _ = form(*_map_sequences(inputs, order), delta_softplus)
    return _sum_directions(y, order, *inputs.x.shape[1:3])


# The backend interface of `dispatch.load_backend`; this backend saves no states for the backward.


def selective_scan(
    inputs: SelectiveScanInputs,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, D, L), channels innermost in memory, the last state and an empty tensor."""
    out, state = run_selective_scan(blocked_scan, inputs, delta_softplus, reverse)
    return _channels_last(out), state.contiguous(), state.new_empty(0)


def selective_scan_backward(
    grad_out: Tensor,
    grad_state: Tensor,
    inputs: SelectiveScanInputs,
    saved_states: Tensor,  # noqa: ARG001
    delta_softplus: bool,
    reverse: bool,
) -> SelectiveScanInputs:
    """Return the gradients of all inputs, in their shapes and dtypes."""
    sequences = _sequences(inputs, reverse)
    dtype, groups = sequences.x.dtype, inputs.B.shape[1]
    grad_y, grad_z = grad_out.to(dtype), None
    if inputs.z is not None:
        y, _ = blocked_scan(*sequences, delta_softplus)
        z = inputs.z.to(dtype)
        gate = torch.sigmoid(z)
        grad_z = grad_y * _from_sequence(y, reverse) * gate * (1 + z * (1 - gate))
        grad_y = grad_y * z * gate
    grads = blocked_scan_backward(
        _to_sequence(grad_y, groups, reverse),
        grad_state.to(dtype).unflatten(1, (groups, -1)),
        *sequences,
        delta_softplus,
    )
    return SelectiveScanInputs(
        _channels_last(_from_sequence(grads.x, reverse).to(inputs.u.dtype)),
        _channels_last(_from_sequence(grads.delta, reverse).to(inputs.delta.dtype)),
        grads.A.flatten(0, 1).to(inputs.A.dtype).contiguous(),
        _from_projection(grads.B, reverse).to(inputs.B.dtype),
        _from_projection(grads.C, reverse).to(inputs.C.dtype),
        None if grads.D is None or inputs.D is None else grads.D.flatten().to(inputs.D.dtype),
        None if grad_z is None or inputs.z is None else _channels_last(grad_z.to(inputs.z.dtype)),
        None
        if grads.delta_bias is None or inputs.delta_bias is None
        else grads.delta_bias.flatten().to(inputs.delta_bias.dtype),
    )


def cross_scan(
    inputs: CrossScanInputs,
    delta_softplus: bool,
    order: str,
    save_states: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Return the sum over the directions, (B, H, W, D), in the dtype of the state, and an empty tensor."""
    out = run_cross_scan(blocked_scan, inputs, delta_softplus, order)
    return out.contiguous(), out.new_empty(0)


def cross_scan_backward(
    grad_out: Tensor,
    inputs: CrossScanInputs,
    saved_states: Tensor,  # noqa: ARG001
    delta_softplus: bool,
    order: str,
) -> CrossScanInputs:
    """Return the gradients of all inputs, in their shapes and dtypes, contiguous."""
    x, delta, A, B, C, D, delta_bias = inputs
    height, width = x.shape[1:3]
    sequences = _map_sequences(inputs, order)
    grad_y = _map_to_sequences(grad_out.to(sequences.x.dtype), A.shape[0], order)
    no_state = torch.zeros(x.shape[0], *A.shape, dtype=grad_y.dtype, device=x.device)
    grads = blocked_scan_backward(grad_y, no_state, *sequences, delta_softplus)
    return CrossScanInputs(
        _sum_directions(grads.x, order, height, width).to(x.dtype).contiguous(),
        _to_pixels(grads.delta, order, height, width).to(delta.dtype).contiguous(),
        grads.A.to(A.dtype).contiguous(),
        _to_pixels(grads.B, order, height, width).to(B.dtype).contiguous(),
        _to_pixels(grads.C, order, height, width).to(C.dtype).contiguous(),
        None if grads.D is None or D is None else grads.D.to(D.dtype),
        None if grads.delta_bias is None or delta_bias is None else grads.delta_bias.to(delta_bias.dtype),
    )


def _sequences(inputs: SelectiveScanInputs, reverse: bool) -> _Sequences:
    u, delta, A, B, C, D, _, delta_bias = inputs
    groups = B.shape[1]
    dtype = state_dtype(u.dtype)
    return _Sequences(
        _to_sequence(u.to(dtype), groups, reverse),
        _to_sequence(delta.to(dtype), groups, reverse),
        A.to(dtype).unflatten(0, (groups, -1)),
        _to_projection(B.to(dtype), reverse),
        _to_projection(C.to(dtype), reverse),
        None if D is None else D.to(dtype).unflatten(0, (groups, -1)),
        None if delta_bias is None else delta_bias.to(dtype).unflatten(0, (groups, -1)),
    )


def _to_sequence(t: Tensor, groups: int, reverse: bool) -> Tensor:
    """(B, D, L) -> (B, L, K, D / K), in scan order."""
    t = t.transpose(1, 2).unflatten(2, (groups, -1))
    return t.flip(1) if reverse else t


def _from_sequence(t: Tensor, reverse: bool) -> Tensor:
    """(B, L, K, D / K) -> (B, D, L), in memory order."""
    t = t.flip(1) if reverse else t
    return t.flatten(2).transpose(1, 2)


def _to_projection(t: Tensor, reverse: bool) -> Tensor:
    """(B, K, N, L) -> (B, L, K, N), in scan order."""
    t = t.permute(0, 3, 1, 2)
    return t.flip(1) if reverse else t


def _from_projection(t: Tensor, reverse: bool) -> Tensor:
    """(B, L, K, N) -> (B, K, N, L), in memory order; K and N innermost in memory."""
    t = t.flip(1) if reverse else t
    return t.contiguous().permute(0, 2, 3, 1)


def _channels_last(t: Tensor) -> Tensor:
    """(B, D, L) stored as (B, L, D)."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _map_sequences(inputs: CrossScanInputs, order: str) -> _Sequences:
    x, delta, A, B, C, D, delta_bias = inputs
    dtype = state_dtype(x.dtype)
    return _Sequences(
        _map_to_sequences(x.to(dtype), A.shape[0], order),
        _to_directions(delta.to(dtype), order),
        A.to(dtype),
        _to_directions(B.to(dtype), order),
        _to_directions(C.to(dtype), order),
        None if D is None else D.to(dtype),
        None if delta_bias is None else delta_bias.to(dtype),
    )


def _map_to_sequences(x: Tensor, directions: int, order: str) -> Tensor:
    """(B, H, W, X) -> (B, L, K, X): the map in the order of each direction."""
    return _to_directions(x[:, :, :, None].expand(-1, -1, -1, directions, -1), order)


def _to_directions(t: Tensor, order: str) -> Tensor:
    """(B, H, W, K, X) -> (B, L, K, X): the slice of each direction in the order of that direction."""
    height, width, groups = t.shape[1:4]
    if order == "cross2d":
        # Flips and transposes are several times faster than an index, and every exporter knows them.
        check_directions(groups, 4, order)
        rows, columns, rows_back, columns_back = t.unbind(3)
        directions = [
            rows,
            columns.transpose(1, 2),
            rows_back.flip(1, 2),
            columns_back.transpose(1, 2).flip(1, 2),
        ]
        return torch.stack([direction.flatten(1, 2) for direction in directions], dim=2)
    pixels = scan_order(order, height, width).to(t.device)
    check_directions(groups, pixels.shape[0], order)
    return t.flatten(1, 2)[:, pixels.t(), torch.arange(groups, device=t.device)]


def _to_pixels(t: Tensor, order: str, height: int, width: int) -> Tensor:
    """(B, L, K, X) -> (B, H, W, K, X): the inverse of `_to_directions`."""
    if order == "cross2d":
        return torch.stack(_cross2d_maps(t, height, width), dim=3)
    pixels = scan_order(order, height, width).to(t.device)
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    out[:, pixels.t(), torch.arange(t.shape[2], device=t.device)] = t
    return out.unflatten(1, (height, width))


def _sum_directions(t: Tensor, order: str, height: int, width: int) -> Tensor:
    """(B, L, K, X) -> (B, H, W, X): the sum of all directions at each pixel."""
    if order == "cross2d":
        rows, columns, rows_back, columns_back = _cross2d_maps(t, height, width)
        return (rows + rows_back) + (columns + columns_back)
    pixels = scan_order(order, height, width).to(t.device)
    total = t.new_zeros(t.shape[0], height * width, t.shape[3])
    # Not in place: exporters know only functional operations.
    return total.index_add(1, pixels.t().flatten(), t.flatten(1, 2)).unflatten(1, (height, width))


def _cross2d_maps(t: Tensor, height: int, width: int) -> list[Tensor]:
    rows, columns, rows_back, columns_back = t.unbind(2)
    return [
        rows.unflatten(1, (height, width)),
        columns.unflatten(1, (width, height)).transpose(1, 2),
        rows_back.unflatten(1, (height, width)).flip(1, 2),
        columns_back.unflatten(1, (width, height)).flip(1, 2).transpose(1, 2),
    ]
