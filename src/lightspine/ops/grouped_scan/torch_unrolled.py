"""The scan with every step written out, for formats without a loop, such as Core ML: one length only.

The two levels are those of `torch_blocked`; no tensor is written into, which such formats do not know.
"""

import torch
from torch import Tensor

from lightspine.ops.grouped_scan.torch_blocked import cut_blocks, length_of_blocks, step_sizes


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
