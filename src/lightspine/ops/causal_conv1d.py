"""Causal depthwise 1D convolution with optional SiLU, for one or several groups of filters on one input."""

# PyTorch prescribes the signatures of fake kernels.
# ruff: noqa: ARG001

import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightspine.errors import UsageError
from lightspine.ops.derivatives import differentiable_gradients, in_transform, refuse_forward_mode
from lightspine.ops.dispatch import choose_backend, is_exporting
from lightspine.ops.inputs import check_tensor
from lightspine.ops.memory_format import channels_last


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    reverse: tuple[bool, ...] = (False,),
    backend: str = "auto",
) -> Tensor:
    """Causal depthwise 1D convolution: the output depends on the position and the W - 1 positions before it.

    Triton kernels compute all groups and the activation in one pass on CUDA, and their backward saves only
    the inputs; other devices run PyTorch's convolution. Sums and SiLU are computed in float32 (float64 for
    float64 input), also under autocast; x, weight and bias may have different dtypes.

    Args:
        x: input, (B, D, L); tokens (B, L, D), transposed, are read in place.
        weight: filters, (K, D, W): K groups, each applied to all of x.
        bias: (K, D).
        silu: apply SiLU to the output.
        reverse: per group, run from the last position to the first, as if the sequence were flipped before
            and after.
        backend: "auto", "torch" or "triton".

    Returns:
        (B, K D, L) in the dtype of x, channels innermost in memory.

    Raises:
        UsageError: a wrong shape or dtype, tensors on several devices, or a backend that cannot run here.

    Examples:
        >>> import torch
        >>> from lightspine.ops import causal_conv1d
        >>> causal_conv1d(torch.ones(1, 2, 5), torch.ones(2, 2, 4), reverse=(False, True))[0, 1:3]
        tensor([[1., 2., 3., 4., 4.],
                [4., 4., 3., 2., 1.]])
    """
    if x.dim() != 3:
        raise UsageError(f"causal_conv1d expects x of shape (B, D, L), received {tuple(x.shape)}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[1] or weight.shape[0] != len(reverse):
        raise UsageError(
            f"causal_conv1d expects weight of shape (K={len(reverse)}, D={x.shape[1]}, W), received "
            f"{tuple(weight.shape)}"
        )
    check_tensor("causal_conv1d", "weight", weight, weight.shape, x.device)
    if bias is not None:
        check_tensor("causal_conv1d", "bias", bias, weight.shape[:2], x.device)
    name = choose_backend(x.device.type, x.dtype, is_exporting(), backend)
    if name == "triton" and not in_transform():
        reversed_groups = sum(1 << group for group, backward in enumerate(reverse) if backward)
        out: Tensor = torch.ops.lightspine.causal_conv1d(x, weight, bias, reversed_groups, silu)
        return out
    return _convolve_groups(x, weight, bias, silu, reverse)


def _convolve_groups(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: tuple[bool, ...]
) -> Tensor:
    """Convolve all groups in standard operations, in the precision of the kernels, also under autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernels, biases = weight.to(dtype), None if bias is None else bias.to(dtype)
    kind = x.device.type
    disabled = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with disabled:
        outputs = [
            _convolve(x.to(dtype), kernels[k], None if biases is None else biases[k], silu, backward)
            for k, backward in enumerate(reverse)
        ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Convolve one group in standard operations."""
    reach = weight.shape[1] - 1
    # As a channels-last image of height 1: tokens keep their layout; on a CPU far faster than conv1d.
    image = channels_last(x.unsqueeze(2))
    kernel = (weight.flip(1) if reverse else weight)[:, None, None]
    out = F.conv2d(image, kernel, bias, padding=(0, reach), groups=x.shape[1]).squeeze(2)
    first = reach if reverse else 0
    out = out[:, :, first : first + x.shape[2]]
    return F.silu(out) if silu else out


@torch.library.custom_op("lightspine::causal_conv1d", mutates_args=())
def causal_conv1d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, reversed_groups: int, silu: bool
) -> Tensor:
    """Return `causal_conv1d` by the Triton kernels; bit k of `reversed_groups` reverses group k."""
    refuse_forward_mode("causal_conv1d")
    from lightspine.ops.triton import conv_launch

    out = conv_launch.causal_conv1d(
        _tokens(x), weight.contiguous(), None if bias is None else bias.contiguous(), reversed_groups, silu
    )
    return out.flatten(2).transpose(1, 2)


@torch.library.custom_op("lightspine::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward_op(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reversed_groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, the last one empty without a bias."""
    refuse_forward_mode("causal_conv1d_backward")
    from lightspine.ops.triton import conv_launch

    grad_x, grad_weight, grad_bias = conv_launch.causal_conv1d_backward(
        _tokens(grad_out).unflatten(2, weight.shape[:2]),
        _tokens(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        reversed_groups,
        silu,
    )
    return grad_x.transpose(1, 2), grad_weight, weight.new_empty(0) if grad_bias is None else grad_bias


@causal_conv1d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reversed_groups: int, silu: bool) -> Tensor:
    batch, _, length = x.shape
    return x.new_empty(batch, length, weight.shape[0] * weight.shape[1]).transpose(1, 2)


@causal_conv1d_backward_op.register_fake
def _(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reversed_groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, length = x.shape
    return (
        x.new_empty(batch, length, dim).transpose(1, 2),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, reversed_groups, silu = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.options = reversed_groups, silu


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradients are to be differentiated (create_graph=True)
        reversed_groups, silu = ctx.options
        reverse = tuple(bool(reversed_groups >> group & 1) for group in range(weight.shape[0]))
        plain = functools.partial(_convolve_groups, silu=silu, reverse=reverse)
        return *differentiable_gradients(plain, (x, weight, bias), (grad_out,)), None, None
    grad_x, grad_weight, grad_bias = torch.ops.lightspine.causal_conv1d_backward(
        grad_out, x, weight, bias, *ctx.options
    )
    return grad_x, grad_weight, None if bias is None else grad_bias, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup_context)


def _tokens(t: Tensor) -> Tensor:
    """(B, D, L) -> (B, L, D), channels adjacent: a view of tokens, a copy of anything else."""
    t = t.transpose(1, 2)
    return t if t.stride(2) == 1 else t.contiguous()


@register_flop_formula(torch.ops.lightspine.causal_conv1d)
def _count_forward(x_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
    return 2 * x_shape[0] * x_shape[2] * weight_shape.numel()


@register_flop_formula(torch.ops.lightspine.causal_conv1d_backward)
def _count_backward(
    grad_out_shape: torch.Size,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    *_: object,
    **__: object,
) -> int:
    # The gradients of x and of the weight cost as much as the forward each.
    return 4 * x_shape[0] * x_shape[2] * weight_shape.numel()
