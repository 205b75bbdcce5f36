"""RMSNorm and LayerNorm with a residual, as `mamba_ssm.ops.triton.layer_norm`."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.compat.checks import check_shape
from lightspine.errors import UsageError


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Add a residual and normalize the last axis: LayerNorm or RMSNorm, computed in float32.

    Args:
        x: input, (..., C).
        weight: (C,).
        bias: (C,), or `None`.
        residual: added to x before the norm, (..., C).
        x1: second input, added to x as well, (..., C).
        weight1: weight of a second output, normalized like the first one, (C,).
        bias1: bias of the second output, (C,).
        eps: added to the variance.
        dropout_p: probability with which elements of x (and of x1) are dropped before the sum.
        rowscale: factor of each row of x, such as a drop-path mask, in the shape of x without its last axis.
        prenorm: also return the sum that was normalized, in the dtype of the residual.
        residual_in_fp32: without a residual, return that sum in float32.
        is_rms_norm: RMSNorm instead of LayerNorm.
        return_dropout_mask: also return the masks of the elements of x and of x1 that were kept, `None`
            without dropout.

    Returns:
        The normalized tensor in the dtype of x; a tuple if there are several results: the outputs of `weight`
        and `weight1`, the sum with `prenorm`, then the masks.

    Raises:
        UsageError: shapes that do not fit, or both `x1` and `rowscale`.
    """
    name = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    _check(name, x, weight, bias, residual, x1, weight1, bias1, rowscale)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total, mask, mask1 = x.to(dtype), None, None
    if rowscale is not None:
        total = total * rowscale.to(dtype)[..., None]
    if dropout_p > 0:
        total, mask = _drop(total, dropout_p)
    if x1 is not None:
        added = x1.to(dtype)
        if dropout_p > 0:
            added, mask1 = _drop(added, dropout_p)
        total = total + added
    if residual is not None:
        total = total + residual
    outputs = [_normalize(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        outputs.append(_normalize(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        kept = torch.float32 if residual_in_fp32 else x.dtype
        outputs.append(total.to(kept if residual is None else residual.dtype))
    if return_dropout_mask:
        return *outputs, mask, mask1
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """RMSNorm with an optional residual: `layer_norm_fn` with `is_rms_norm=True`."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        True,
        return_dropout_mask,
    )


class RMSNorm(nn.Module):
    """RMSNorm of the last axis with an optional residual, as `mamba_ssm`'s module.

    Args:
        hidden_size: number of channels C.
        eps: added to the mean square.
        dropout_p: probability of dropping elements of the input in training.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """Map (..., C) to (..., C); with `prenorm` to the output and the sum with the residual."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _check(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    rowscale: Tensor | None,
) -> None:
    if x1 is not None and not isinstance(x1, Tensor):
        raise UsageError(
            f"{name} expects a tensor as x1, its fifth argument, received {x1!r}: pass eps by name"
        )
    if x1 is not None and rowscale is not None:
        raise UsageError(f"{name} expects rowscale or x1, received both")
    channels = x.shape[-1:]
    for label, tensor in (("weight", weight), ("bias", bias), ("weight1", weight1), ("bias1", bias1)):
        check_shape(name, label, tensor, channels, "(C,)")
    for label, tensor in (("residual", residual), ("x1", x1)):
        check_shape(name, label, tensor, x.shape, "(..., C)")
    check_shape(name, "rowscale", rowscale, x.shape[:-1], "(...)")


def _drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Return x with elements dropped, and the mask of those that were kept."""
    kept = torch.rand_like(x) > probability
    return torch.where(kept, x / (1 - probability), 0.0), kept


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    out = F.rms_norm(x, x.shape[-1:], weight, eps)
    return out if bias is None else out + bias
