"""The scan in standard PyTorch operations, in two levels: within all blocks at once, and across blocks.

A loop over all L positions costs L small operations. Here the sequence is cut into blocks of about sqrt(L)
positions and the loops run over the positions of a block (vectorised over the blocks) and over the blocks:
some 3 sqrt(L) steps.

The decay over a whole block is exp(A * sum of its steps). Nothing is divided by a running product of decays,
which underflows, so the result is as exact as that of the plain loop.

Shapes: x and dt (B, L, K, D); A (K, D, N); B and C (B, L, K, N), one dtype for all. A block axis J and the
    position T
within a block replace L: (B, J, T, K, D).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan as higher_order_scan

GroupedScan = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor]
]
"""What takes and gives what `blocked_scan` does."""


class GroupedGradients(NamedTuple):
    """Gradients of `blocked_scan` in the order and the shapes of its arguments."""

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
    """Scan K groups of channels from the first position to the last.

    Args:
        x: input, (B, L, K, D).
        delta: steps before bias and softplus, (B, L, K, D).
        A: state matrices, (K, D, N).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        D: skips, (K, D).
        delta_bias: added to delta, (K, D).
        delta_softplus: pass the steps through softplus.

    Returns:
        The output (B, L, K, D) and the last state (B, K, D, N), in the dtype of the inputs.
    """
    length = x.shape[1]
    dt = step_sizes(delta, delta_bias, delta_softplus)
    block = length_of_blocks(length)
    dts, Bs, Cs = (cut_blocks(t, block) for t in (dt, B, C))
    inputs = cut_blocks(dt * x, block)
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
) -> GroupedGradients:
    """Return the gradients of `blocked_scan`; the states are computed again from the inputs.

    Args:
        grad_y: gradient of the output, (B, L, K, D).
        grad_last: gradient of the last state, (B, K, D, N).
        x: as in the forward, like all that follow.
        delta: see x.
        A: see x.
        B: see x.
        C: see x.
        D: see x.
        delta_bias: see x.
        delta_softplus: see x.
    """
    length = x.shape[1]
    dt = step_sizes(delta, delta_bias, delta_softplus)
    block = length_of_blocks(length)
    dts, Bs, Cs, xs, grad_ys = (cut_blocks(t, block) for t in (dt, B, C, x, grad_y))

    inputs = dts * xs
    state, _ = _block_starts(inputs, dts, A, Bs)
    states = [state]
    for t in range(block):
        decay = torch.exp(dts[:, :, t, ..., None] * A)
        states.append(decay * states[-1] + inputs[:, :, t, ..., None] * Bs[:, :, t, :, None])

    # The adjoint of the state obeys the same recurrence from the end: g_t = C_t dy_t + decay_{t+1} g_{t+1}.
    # `inflow` is decay_{t+1} g_{t+1}, what position t receives from its right.
    inflow = _block_ends(grad_ys, grad_last, dts, A, Cs)
    grad_x, grad_dt = torch.empty_like(xs), torch.empty_like(xs)
    grad_B, grad_C = torch.empty_like(Bs), torch.empty_like(Cs)
    grad_A = torch.zeros_like(A)
    for t in range(block - 1, -1, -1):
        step, value, grad = dts[:, :, t, ..., None], xs[:, :, t, ..., None], grad_ys[:, :, t, ..., None]
        B_t = Bs[:, :, t, :, None]
        adjoint = grad * Cs[:, :, t, :, None] + inflow
        inflow = adjoint * torch.exp(step * A)
        through_decay = inflow * states[t]
        grad_C[:, :, t] = (grad * states[t + 1]).sum(3)
        grad_B[:, :, t] = (adjoint * (step * value)).sum(3)
        grad_A += (through_decay * step).sum((0, 1))
        by_input = (adjoint * B_t).sum(-1)
        grad_x[:, :, t] = by_input * step[..., 0]
        grad_dt[:, :, t] = by_input * value[..., 0] + (through_decay * A).sum(-1)

    grad_x, grad_dt, grad_B, grad_C = (t.flatten(1, 2)[:, :length] for t in (grad_x, grad_dt, grad_B, grad_C))
    if D is not None:
        grad_x = grad_x + grad_y * D
    if delta_softplus:
        grad_dt = grad_dt * torch.sigmoid(delta if delta_bias is None else delta + delta_bias)
    return GroupedGradients(
        grad_x,
        grad_dt,
        grad_A,
        grad_B,
        grad_C,
        None if D is None else (grad_y * x).sum((0, 1)),
        None if delta_bias is None else grad_dt.sum((0, 1)),
    )


def step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Return delta with its bias and through softplus, where asked for."""
    dt = delta if delta_bias is None else delta + delta_bias
    return F.softplus(dt) if delta_softplus else dt


def length_of_blocks(length: int) -> int:
    """Return the positions of a block, about the root of a length."""
    blocks = max(1, round(math.sqrt(length)))
    return -(-length // blocks)


def cut_blocks(t: Tensor, block: int) -> Tensor:
    """(B, L, K, X) -> (B, J, T, K, X); zeros at the end: a step of zero keeps the state."""
    padding = -t.shape[1] % block
    if padding:
        t = F.pad(t, (0, 0, 0, 0, 0, padding))
    return t.unflatten(1, (-1, block))


def _block_starts(inputs: Tensor, dts: Tensor, A: Tensor, Bs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before each block, (B, J, K, D, N), and the last state, (B, K, D, N)."""
    batch, blocks, block = dts.shape[:3]
    # What each block adds to the state, were it to start from zero.
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
    """Return what the last position of each block receives from its right, (B, J, K, D, N)."""
    batch, blocks, block = dts.shape[:3]
    # What each block sends to its left, were it to receive nothing.
    sent = dts.new_zeros(batch, blocks, *A.shape)
    for t in range(block - 1, -1, -1):
        sent = sent + grad_ys[:, :, t, ..., None] * Cs[:, :, t, :, None]
        sent = torch.exp(dts[:, :, t, ..., None] * A) * sent
    decay = torch.exp(dts.sum(2)[..., None] * A)
    flow = grad_last
    ends = []
    for j in range(blocks - 1, -1, -1):
        ends.append(flow)
        flow = decay[:, j] * flow + sent[:, j]
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
    """Scan K groups of channels; arguments and results as in `blocked_scan`."""
    dt = step_sizes(delta, delta_bias, delta_softplus)

    def step(state: Tensor, now: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        dt_t, input_t, B_t, C_t = now  # (B, K, D) twice, (B, K, N) twice
        state = torch.exp(dt_t[..., None] * A) * state + input_t[..., None] * B_t[:, :, None]
        return state, (state * C_t[:, :, None]).sum(-1)

    # Scanned along the first axis; ONNX Runtime scans that one without a transpose.
    sequences = tuple(t.movedim(1, 0) for t in (dt, dt * x, B, C))
    start = torch.zeros_like(sequences[0][0])[..., None] * A
    last, y = higher_order_scan(step, start, sequences)
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
    """Scan K groups of channels; arguments and results as in `blocked_scan`."""
    length = int(x.shape[1])
    dt = step_sizes(delta, delta_bias, delta_softplus)
    block = length_of_blocks(length)
    dts, Bs, Cs, inputs = (cut_blocks(t, block).unbind(2) for t in (dt, B, C, dt * x))  # (B, J, K, D or N)
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
