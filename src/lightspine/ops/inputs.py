"""Inputs of the scans: their shapes, checks, and the strided form that the compiled kernels read."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightspine.errors import UsageError


class SelectiveScanInputs(NamedTuple):
    """Tensors of one selective scan.

    Attributes:
        u: input, (B, D, L).
        delta: dt before bias and softplus, (B, D, L).
        A: state matrix, (D, N).
        B: input projection, (B, K, N, L).
        C: output projection, (B, K, N, L).
        D: skip connection, (D,).
        z: gate, (B, D, L).
        delta_bias: added to delta, (D,).
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


class CrossScanInputs(NamedTuple):
    """Tensors of one scan of a feature map; delta, B and C are in pixel order.

    Attributes:
        x: feature map, (B, H, W, D), shared by the K directions.
        delta: dt before bias and softplus, (B, H, W, K, D).
        A: state matrices, (K, D, N).
        B: input projections, (B, H, W, K, N).
        C: output projections, (B, H, W, K, N).
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


class Strided(NamedTuple):
    """A tensor read as (B, L, K, X) without creating a view.

    Attributes:
        tensor: holds the memory; its own axes do not matter.
        batch: stride of B in elements.
        position: stride of L.
        group: stride of K; 0 where all groups share the memory.
        last: stride of X.
    """

    tensor: Tensor
    batch: int
    position: int
    group: int
    last: int = 1


class GroupedInputs(NamedTuple):
    """Inputs of the compiled kernels: one scan for each of K groups of D channels.

    Both operators are cases of it: a selective scan has one position order for all groups, a cross scan has
    one group per direction, and all of them read the same feature map.

    Attributes:
        sizes: B, L, K, D of a group, N.
        dtype: dtype of the state: float32, or float64 for float64 input.
        x: input, (B, L, K, D), channels contiguous; the CPU kernels take contiguous positions, too.
        delta: dt before bias and softplus, (B, L, K, D), likewise.
        A: state matrices, (K, D, N) or (K D, N).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        D: skip connections, (K, D) or (K D,).
        z: gate, (B, L, K, D), likewise.
        delta_bias: added to delta, in the shape of D.
        delta_softplus: apply softplus to dt.
        reversed_groups: without an order, bit k means that group k is scanned from the last position to the
            first; -1 reverses all of them. The CPU kernels take 0 and -1.
        order: position visited at each scan step, (K, L) int64 on the CPU; `None` for memory order.
        dt_weight: forward on a CPU only: `delta` is (B, L, K, R), and this contiguous (K, R, D) tensor of
            the state's dtype projects it to dt.
    """

    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype
    x: Strided
    delta: Strided
    A: Tensor
    B: Strided
    C: Strided
    D: Tensor | None
    z: Strided | None
    delta_bias: Tensor | None
    delta_softplus: bool
    reversed_groups: int
    order: Tensor | None
    dt_weight: Tensor | None = None


class ParameterGradients(NamedTuple):
    """Gradients that the kernels sum over channels or positions, in the dtype of the state.

    Attributes:
        A: (K, D, N).
        B: (B, L, K, N).
        C: (B, L, K, N).
        D: (K, D), `None` without D.
        delta_bias: (K, D), `None` without delta_bias.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


def positions_innermost(t: Tensor) -> bool:
    """Return whether a sequence (B, D, L) has positions instead of channels innermost in memory."""
    return t.stride(2) == 1 and t.stride(1) != 1 and t.shape[1] > 1


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the state for an input dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_selective_scan(inputs: SelectiveScanInputs) -> None:
    """Check shapes, dtypes and devices; the compiled kernels rely on it for memory safety.

    Raises:
        UsageError: a wrong shape, an empty axis, a complex or integer dtype, or tensors on several devices.
    """
    u, A, B = inputs.u, inputs.A, inputs.B
    if u.dim() != 3:
        raise UsageError(f"selective_scan expects u of shape (B, D, L), received {tuple(u.shape)}")
    batch, dim, length = u.shape
    if A.dim() != 2 or A.shape[0] != dim:
        raise UsageError(f"selective_scan expects A of shape (D={dim}, N), received {tuple(A.shape)}")
    state_dim = A.shape[1]
    if B.dim() != 4:
        raise UsageError(
            "selective_scan expects B of shape (B, N, L), (B, K, N, L) or (D, N), "
            f"received {tuple(B.shape)} with u {tuple(u.shape)}"
        )
    groups = B.shape[1]
    for name, size in (("L", length), ("N", state_dim), ("K", groups), ("D", dim)):
        if size == 0:
            raise UsageError(f"selective_scan expects {name} of at least 1, received {name} = 0")
    if dim % groups:
        raise UsageError(
            "selective_scan expects the channels of u to divide into the groups of B, "
            f"received D={dim} and K={groups}"
        )
    projection = (batch, groups, state_dim, length)
    shapes = (u.shape, u.shape, A.shape, projection, projection, (dim,), u.shape, (dim,))
    for name, tensor, shape in zip(SelectiveScanInputs._fields, inputs, shapes, strict=True):
        if tensor is not None:
            check_tensor("selective_scan", name, tensor, shape, u.device)


def check_cross_scan(inputs: CrossScanInputs, dt_rank: int | None = None) -> None:
    """Check shapes, dtypes and devices; the compiled kernels rely on it for memory safety.

    Args:
        inputs: the tensors.
        dt_rank: size of the last axis of `delta` where it is projected to D channels later.

    Raises:
        UsageError: a wrong shape, an empty axis, a complex or integer dtype, or tensors on several devices.
    """
    x, A = inputs.x, inputs.A
    if x.dim() != 4:
        raise UsageError(f"cross_scan expects x of shape (B, H, W, D), received {tuple(x.shape)}")
    batch, height, width, dim = x.shape
    if A.dim() != 3 or A.shape[1] != dim:
        raise UsageError(f"cross_scan expects A of shape (K, D={dim}, N), received {tuple(A.shape)}")
    groups, _, state_dim = A.shape
    for name, size in (("H", height), ("W", width), ("D", dim), ("K", groups), ("N", state_dim)):
        if size == 0:
            raise UsageError(f"cross_scan expects {name} of at least 1, received {name} = 0")
    dt = (batch, height, width, groups, dim if dt_rank is None else dt_rank)
    projection = (batch, height, width, groups, state_dim)
    shapes = (x.shape, dt, A.shape, projection, projection, (groups, dim), (groups, dim))
    for name, tensor, shape in zip(CrossScanInputs._fields, inputs, shapes, strict=True):
        if tensor is not None:
            check_tensor("cross_scan", name, tensor, shape, x.device)


def check_tensor(
    operator: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """Check the shape, device and dtype of one tensor.

    Raises:
        UsageError: another shape or device, or a dtype that is not real floating point.
    """
    if tensor.shape != shape:
        raise UsageError(f"{operator} expects {name} of shape {tuple(shape)}, received {tuple(tensor.shape)}")
    if tensor.device != device:
        raise UsageError(f"{operator} expects all tensors on {device}, received {name} on {tensor.device}")
    if not tensor.dtype.is_floating_point:
        raise UsageError(f"{operator} expects {name} of a real floating dtype, received {tensor.dtype}")


def check_directions(groups: int, directions: int, order: str) -> None:
    """Check that the tensors have as many groups as the scan order has directions.

    Raises:
        UsageError: the numbers differ.
    """
    if groups != directions:
        raise UsageError(f"cross_scan expects K={directions} for the order {order!r}, received K={groups}")
