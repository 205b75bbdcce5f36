"""The selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t.

README.md beside this file explains the algorithms.
"""

import torch
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.dispatch import choose_backend
from lightspine.ops.selective_scan import torch_backend
from lightspine.ops.selective_scan.checks import ScanInputs, check_inputs
from lightspine.ops.selective_scan.operator import selective_scan_op
from lightspine.ops.selective_scan.reference import selective_scan_reference
from lightspine.ops.torch_scan import exported_scan

__all__ = ["scan", "selective_scan", "selective_scan_op", "selective_scan_reference"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan of Mamba (section 3.2) over a batch of sequences.

    The arguments are those of `mamba_ssm`'s `selective_scan_fn`. The state, A and the steps are float32
    (float64 for float64 input) whatever autocast says; u, delta, B, C and z may be bfloat16 or float16.
    Tensors need not be contiguous; the fastest layout is channels innermost, a `transpose(1, 2)` of (B, L, D)
    tokens.

    Args:
        u: input, (B, D, L).
        delta: steps before bias and softplus, (B, D, L).
        A: state matrix, negative, (D, N).
        B: input projection: (B, N, L); (B, K, N, L), where channel d reads group d // (D / K); or constant,
            (D, N).
        C: output projection, in one of the shapes of B.
        D: skip, (D,): adds D u to the output.
        z: gate, (B, D, L): the output is multiplied by SiLU(z).
        delta_bias: added to delta, (D,).
        delta_softplus: pass delta, after its bias, through softplus.
        return_last_state: return the state after the last position as well.
        reverse: walk from the last position to the first; the last state is then that of position 0.
        backend: "auto" (by the device of `u`), or one of `lightspine.ops.dispatch.available_backends()`.

    Returns:
        The output (B, D, L) in the dtype of `u`; with `return_last_state` also the state, (B, D, N).

    Raises:
        UsageError: shapes, dtypes or devices that do not fit, or a backend that is unknown or cannot run
            here.

    Examples:
        >>> u, delta = torch.randn(2, 8, 50), torch.randn(2, 8, 50)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 50), torch.randn(2, 4, 50)
        >>> selective_scan(u, delta, A, B, C, delta_softplus=True).shape
        torch.Size([2, 8, 50])
    """
    B, C = _projections(u, A, B, C)
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    check_inputs(inputs)
    out, state = _run(inputs, delta_softplus, reverse, backend)
    return (out, state) if return_last_state else out


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
    keep: bool = True,
) -> Tensor:
    """`selective_scan` with one return type and 4-D B and C, for the models: it scripts and traces.

    `keep=False` notes no states for the backward, which then finds them by one more walk: what
    `lightspine.layers.recompute` asks for.
    """
    # A script compiles no block under this condition; the two must not be joined by `and`.
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        plain = backend == "reference" or torch.onnx.is_in_onnx_export()
        if plain:
            return _run(ScanInputs(u, delta, A, B, C, D, z, delta_bias), delta_softplus, reverse, backend)[0]
    keep = keep and torch.is_grad_enabled()
    out, _, _ = torch.ops.lightspine.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, keep, backend
    )
    return out


def _run(inputs: ScanInputs, delta_softplus: bool, reverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    exporting = torch.onnx.is_in_onnx_export()
    name = choose_backend(inputs.u.device.type, inputs.u.dtype, exporting, backend)
    if name == "reference":
        return selective_scan_reference(*inputs, delta_softplus, reverse)
    if exporting:
        return torch_backend.forward(inputs, delta_softplus, reverse, run=exported_scan)
    out, state, _ = selective_scan_op(*inputs, delta_softplus, reverse, torch.is_grad_enabled(), name)
    return out, state


def _projections(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Bring B and C, each in any of its three shapes, to (B, K, N, L) with one K."""
    B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))
    if B.dim() == 4 and C.dim() == 4:
        return B, C
    # A constant projection differs between channels: every channel becomes a group of its own.
    return _per_channel("B", u, A, B), _per_channel("C", u, A, C)


def _per_channel(name: str, u: Tensor, A: Tensor, t: Tensor) -> Tensor:
    batch, dim, length = u.shape
    if t.dim() == 4 and t.shape[1] and dim % t.shape[1] == 0:
        return t.repeat_interleave(dim // t.shape[1], dim=1)
    if t.shape != A.shape:
        raise UsageError(
            f"selective_scan expects {name} of shape (B, N, L), (B, K, N, L) or (D, N), "
            f"received {tuple(t.shape)} with u {tuple(u.shape)} and A {tuple(A.shape)}"
        )
    return t[None, :, :, None].expand(batch, -1, -1, length)
