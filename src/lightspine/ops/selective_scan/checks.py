"""What `selective_scan` accepts; every backend relies on it, the compiled kernels for their memory safety."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightspine.errors import UsageError


class ScanInputs(NamedTuple):
    """The tensors of one selective scan.

    Attributes:
        u: input, (B, D, L).
        delta: steps before bias and softplus, (B, D, L).
        A: state matrix, (D, N).
        B: input projection, (B, K, N, L).
        C: output projection, (B, K, N, L).
        D: skip, (D,).
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


def check_inputs(inputs: ScanInputs) -> None:
    """Raise unless the tensors fit together.

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
    for name, tensor, shape in zip(ScanInputs._fields, inputs, shapes, strict=True):
        if tensor is not None:
            check_tensor("selective_scan", name, tensor, tuple(shape), u.device)


def check_tensor(
    operator: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless one tensor has the expected shape, lies on the device and is of a real floating dtype.

    Raises:
        UsageError: it does not.
    """
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{operator} expects {name} of shape {shape}, received {tuple(tensor.shape)}")
    if tensor.device != device:
        raise UsageError(f"{operator} expects all tensors on {device}, received {name} on {tensor.device}")
    if not tensor.dtype.is_floating_point:
        raise UsageError(f"{operator} expects {name} of a real floating dtype, received {tensor.dtype}")
