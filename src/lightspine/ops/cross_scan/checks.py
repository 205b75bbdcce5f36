"""What `cross_scan` accepts; every backend relies on it, the compiled kernels for their memory safety."""

from typing import NamedTuple

from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.selective_scan.checks import check_tensor


class CrossScanInputs(NamedTuple):
    """The tensors of one scan over a map; steps and projections lie in pixel order.

    Attributes:
        x: map, (B, H, W, D), shared by the K directions.
        delta: steps before bias and softplus, (B, H, W, K, D).
        A: state matrices, (K, D, N).
        B: input projections, (B, H, W, K, N).
        C: output projections, (B, H, W, K, N).
        D: skips, (K, D).
        delta_bias: added to delta, (K, D).
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


def check_inputs(inputs: CrossScanInputs, rank: int | None = None) -> None:
    """Raise unless the tensors fit together.

    Args:
        inputs: the tensors.
        rank: last axis of `delta` where it does not hold the steps of D channels.

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
    steps = (batch, height, width, groups, dim if rank is None else rank)
    projection = (batch, height, width, groups, state_dim)
    shapes = (x.shape, steps, A.shape, projection, projection, (groups, dim), (groups, dim))
    for name, tensor, shape in zip(CrossScanInputs._fields, inputs, shapes, strict=True):
        if tensor is not None:
            check_tensor("cross_scan", name, tensor, tuple(shape), x.device)


def check_directions(groups: int, directions: int, order: str) -> None:
    """Raise unless the scan order has as many directions as the tensors.

    Raises:
        UsageError: it has not.
    """
    if groups != directions:
        raise UsageError(f"cross_scan expects K={directions} for the order {order!r}, received K={groups}")
