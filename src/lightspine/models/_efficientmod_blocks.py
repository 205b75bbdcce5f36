"""The blocks of EfficientMod (Ma et al., ICLR 2024, section 3): maps `(B, C, H, W)` of any size in and out.

Inside, channels are innermost: the linear maps and norms then need no copy, and neither does the depthwise
convolution, which is handed the same memory as a `channels_last` map.
"""

from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor

from lightspine.errors import UsageError

Fusion = Literal["product", "sum"]


class ContextLayer(nn.Module):
    """What surrounds each position: linear `f`, depthwise convolution, GELU, linear `g`."""

    def __init__(self, dim: int, kernel_size: int, context_f: bool, context_g: bool):
        super().__init__()
        self.f = nn.Linear(dim, dim) if context_f else nn.Identity()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.act = nn.GELU()
        self.g = nn.Linear(dim, dim) if context_g else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x = self.conv(self.f(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.g(self.act(x))


class ModulationMlp(nn.Module):
    """An MLP whose hidden features are modulated by their context (section 3.2)."""

    def __init__(
        self,
        dim: int,
        expand_ratio: int,
        kernel_size: int,
        context_f: bool,
        context_g: bool,
        fusion: Fusion,
    ):
        super().__init__()
        self.expand_ratio = expand_ratio
        self.sums = fusion == "sum"
        self.context = ContextLayer(dim, kernel_size, context_f, context_g)
        self.fc1 = nn.Linear(dim, dim * expand_ratio)
        # Published: without expansion the values stay linear.
        self.act = nn.GELU() if expand_ratio > 1 else nn.Identity()
        self.fc2 = nn.Linear(dim * expand_ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        # (B, H, W, r, C): the context meets each of the r groups of hidden channels, without a tiled copy.
        # Fresh memory costs time on large maps, so the values are overwritten; autograd keeps a copy.
        context = self.context(x).unsqueeze(3)
        value = self.act(self.fc1(x).unflatten(3, (self.expand_ratio, -1)))
        fused = value.add_(context) if self.sums else value.mul_(context)
        return self.fc2(fused.flatten(3))


class EfficientModBlock(nn.Module):
    """EfficientMod's modulation block: one norm, one residual branch, context times values (section 3.2).

    Args:
        dim: channels of the map.
        expand_ratio: hidden width as a multiple of `dim`; the paper's models alternate 1 with 4 or 6.
        kernel_size: odd side of the context's depthwise convolution.
        context_f: linear map before the context's convolution; the paper's ablation leaves it out.
        context_g: linear map behind it; the paper's ablation leaves it out.
        fusion: "product" of context and values, or "sum", the paper's ablation.
        drop_path: probability with which a sample skips the block in training.
        layer_scale_init: initial factor of the residual branch, per channel.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W; the output is `channels_last` in memory.

    Raises:
        UsageError: `kernel_size` is not odd and positive, `expand_ratio` is below 1, or `fusion` is unknown.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import EfficientModBlock
        >>> block = EfficientModBlock(dim=32, expand_ratio=6, kernel_size=7)
        >>> block(torch.randn(2, 32, 14, 9)).shape
        torch.Size([2, 32, 14, 9])
    """

    def __init__(
        self,
        dim: int,
        expand_ratio: int = 6,
        kernel_size: int = 7,
        *,
        context_f: bool = True,
        context_g: bool = True,
        fusion: Fusion = "product",
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-4,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"kernel_size must be odd and positive, got {kernel_size}")
        if expand_ratio < 1:
            raise UsageError(f"expand_ratio must be at least 1, got {expand_ratio}")
        if fusion not in ("product", "sum"):
            raise UsageError(f"fusion must be 'product' or 'sum', got {fusion!r}")
        self.norm = nn.LayerNorm(dim)
        self.mlp = ModulationMlp(dim, expand_ratio, kernel_size, context_f, context_g, fusion)
        self.gamma = nn.Parameter(layer_scale_init * torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        x = x + self.drop_path(self.gamma * self.mlp(self.norm(x)))
        return x.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention without positions; heads have a least width and may exceed `dim` together."""

    def __init__(self, dim: int, num_heads: int, min_head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = max(dim // num_heads, min_head_dim)
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=False)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out.transpose(1, 2).reshape(B, H, W, self.num_heads * self.head_dim))


class EfficientModAttentionBlock(nn.Module):
    """EfficientMod's attention block: self-attention and an MLP, each a residual branch without layer scale.

    Args:
        dim: channels of the map.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`.
        min_head_dim: least width of a head; narrow maps are widened inside to `num_heads * min_head_dim`.
        drop_path: probability with which a sample skips a branch in training.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W; the output is `channels_last` in memory.

    Raises:
        UsageError: `num_heads` or `min_head_dim` below 1.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import EfficientModAttentionBlock
        >>> block = EfficientModAttentionBlock(dim=128)
        >>> block(torch.randn(2, 128, 7, 5)).shape
        torch.Size([2, 128, 7, 5])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        *,
        min_head_dim: int = 32,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if num_heads < 1 or min_head_dim < 1:
            raise UsageError(
                f"num_heads and min_head_dim must be at least 1, got {num_heads} and {min_head_dim}"
            )
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, min_head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Strided convolution with bias, and a layer norm over channels: the stem and the downsampling."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__()
        # Its bias keeps PyTorch's own initialisation, as published; so do all convolutions of EfficientMod.
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride)), `channels_last` in memory."""
        x = self.conv(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as published; leave every other module alone."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
