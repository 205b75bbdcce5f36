"""Launch of the norm kernel."""

import torch
from torch import Tensor

from lightspine.ops.triton.launch import launch
from lightspine.ops.triton.norm_kernels import add_norm_kernel

# Numbers of a program: 16 for each thread of four warps.
_BLOCK, _WARPS = 2048, 4


def add_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Return x + update in the dtype of x, x itself without an update, and its norm in that of the weight.

    Args:
        x: (..., C).
        update: (..., C), or `None`.
        weight: (C,).
        bias: (C,), or `None`.
        eps: added to the variance.
        rms: divide by the root of the mean square instead of centering and dividing by the deviation.
    """
    import triton.language as tl

    x = x.contiguous()
    total = x if update is None else torch.empty_like(x)
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    dim = x.shape[-1]
    rows = x.numel() // dim
    block_c = 1 << (dim - 1).bit_length()
    block_r = max(1, _BLOCK // block_c)
    if rows:
        launch(
            add_norm_kernel,
            -(-rows // block_r),
            num_warps=_WARPS,
            p_x=x,
            p_update=None if update is None else update.contiguous(),
            p_weight=weight.contiguous(),
            p_bias=None if bias is None else bias.contiguous(),
            p_sum=total,
            p_out=out,
            rows=rows,
            dim=dim,
            eps=eps,
            RMS=rms,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
        )
    return total, out
