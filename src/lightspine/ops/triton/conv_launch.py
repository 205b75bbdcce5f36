"""Launch of the causal depthwise 1D convolution kernels."""

from typing import Any

import torch
from torch import Tensor

from lightspine.ops.triton.conv_kernels import causal_conv1d_bwd_kernel, causal_conv1d_fwd_kernel
from lightspine.ops.triton.launch import launch

# 16 positions by 64 channels: 8 numbers per thread of four warps.
_BLOCK_T, _BLOCK_D, _WARPS = 16, 64, 4


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reversed_groups: int, silu: bool) -> Tensor:
    """Convolve one sequence by K groups of filters.

    Args:
        x: input, (B, L, D), channels adjacent.
        weight: filters, (K, D, W), contiguous.
        bias: (K, D), contiguous.
        reversed_groups: bit k says that group k runs from the last position to the first.
        silu: apply SiLU.

    Returns:
        (B, L, K, D), contiguous, in the dtype of x.
    """
    out = x.new_empty((*x.shape[:2], *weight.shape[:2]))
    arguments = _arguments(x, weight, bias, reversed_groups, silu)
    blocks = -(-x.shape[2] // _BLOCK_D)
    programs = x.shape[0] * arguments["time_blocks"] * weight.shape[0] * blocks
    launch(causal_conv1d_fwd_kernel, programs, num_warps=_WARPS, p_out=out, **arguments)
    return out


def causal_conv1d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reversed_groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the gradients of x, weight and bias from the inputs of the forward.

    Args:
        grad_out: gradient of the output, (B, L, K, D), channels adjacent.
        x: as in the forward, like the arguments that follow.
        weight: see there.
        bias: see there.
        reversed_groups: see there.
        silu: see there.

    Returns:
        The gradients, contiguous, in the dtypes of their tensors.
    """
    groups, dim, width = weight.shape
    arguments = _arguments(x, weight, bias, reversed_groups, silu)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    sums = torch.empty(
        x.shape[0] * arguments["time_blocks"], groups, width + 1, dim, dtype=state_dtype, device=x.device
    )
    programs = sums.shape[0] * -(-dim // _BLOCK_D)
    launch(
        causal_conv1d_bwd_kernel,
        programs,
        num_warps=_WARPS,
        p_grad_out=grad_out,
        p_grad_x=grad_x,
        p_grad_parameters=sums,
        grad_out_strides=grad_out.stride(),
        **arguments,
    )
    total = sums.sum(0)
    grad_weight = total[:, :width].transpose(1, 2).to(weight.dtype).contiguous()
    grad_bias = None if bias is None else total[:, width].to(bias.dtype, copy=True)
    return grad_x, grad_weight, grad_bias


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, reversed_groups: int, silu: bool
) -> dict[str, Any]:
    import triton.language as tl

    return {
        "p_x": x,
        "p_weight": weight,
        "p_bias": bias,
        "x_strides": x.stride(),
        "length": x.shape[1],
        "groups": weight.shape[0],
        "dim": x.shape[2],
        "time_blocks": -(-x.shape[1] // _BLOCK_T),
        "reversed_groups": reversed_groups,
        "W": weight.shape[2],
        "SILU": silu,
        "BLOCK_T": _BLOCK_T,
        "BLOCK_D": _BLOCK_D,
        "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
