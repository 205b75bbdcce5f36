"""The scan as one `scan` node of the exported graph, for formats that have a loop of their own, such as ONNX.

The blocked scan unrolls its loops into the graph: thousands of nodes, for one size of image only. PyTorch's
higher-order `scan` becomes a loop node whose length stays free. It is slow outside an exporter.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan as higher_order_scan

from lightspine.ops.grouped_scan.torch_blocked import step_sizes


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
