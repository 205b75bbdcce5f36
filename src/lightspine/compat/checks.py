"""Checks of arguments that the functions of this package share."""

from typing import Any

import torch
from torch import Tensor

from lightspine.errors import UsageError


def check_real(function: str, A: Tensor) -> None:
    """Check that the state matrix is real.

    Raises:
        UsageError: A is complex.
    """
    if A.is_complex():
        raise UsageError(
            f"{function} expects a real state matrix A, received {str(A.dtype).removeprefix('torch.')}: "
            "complex state matrices, which no vision model uses, are not supported"
        )


def check_shape(function: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], axes: str) -> None:
    """Check the shape of a tensor, unless it is `None`.

    Args:
        function: name for the message.
        name: name of the argument.
        tensor: the argument.
        shape: expected shape.
        axes: names of the axes, such as "(B, D, L)".

    Raises:
        UsageError: another shape.
    """
    if tensor is not None and tensor.shape != shape:
        raise UsageError(
            f"{function} expects {name} of shape {axes} = {tuple(shape)}, received {tuple(tensor.shape)}"
        )


def uses_silu(function: str, activation: Any) -> bool:
    """Return whether an activation of causal_conv1d is SiLU.

    Raises:
        UsageError: it is neither `None` nor "silu" nor "swish".
    """
    if activation not in (None, "silu", "swish"):
        raise UsageError(f"{function} expects activation None, 'silu' or 'swish', received {activation!r}")
    return activation is not None


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of `torch.autocast` for the device of a tensor, or `None` outside of it."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert a tensor of 16 bits to float32 and return others unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_layout_of(out: Tensor, x: Tensor) -> Tensor:
    """Return a sequence (B, D, L) with positions innermost in memory if those of another one are.

    Callers of mamba_ssm pass contiguous sequences and call `view` on what they receive.
    """
    return out.contiguous() if x.stride(-1) == 1 and x.shape[1] > 1 else out
