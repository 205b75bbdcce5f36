"""The blocks of SHViT (Yun and Ro, CVPR 2024, section 3): maps `(B, C, H, W)` of any size in and out."""

from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor

from lightspine.errors import UsageError


class ConvNorm(nn.Sequential):
    """Convolution without bias and batch norm; padded so that stride 1 keeps the size.

    A `norm_init` of 0 starts the residual branch that ends here silent.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_init: float = 1.0,
    ):
        conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(out_dim)
        nn.init.constant_(norm.weight, norm_init)
        super().__init__(OrderedDict(conv=conv, norm=norm))


class FeedForward(nn.Module):
    """Two 1x1 convolutions with batch norm, ReLU between; the second one starts at zero."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden_dim)
        self.act = nn.ReLU(inplace=True)
        self.pw2 = ConvNorm(hidden_dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return self.pw2(self.act(self.pw1(x)))


class SHSA(nn.Module):
    """Single-head self-attention over the first `partial_dim` channels of a map (section 3.2).

    The other channels wait beside it; one projection, behind a ReLU, then mixes all of them. The projection's
    norm starts at zero, as published, so a fresh module inside a residual branch adds nothing.

    Args:
        dim: channels of the map.
        partial_dim: channels that attend; by default 3/14 of `dim`, rounded down, the ratio of the paper.
        qk_dim: width of the queries and keys.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W.

    Raises:
        UsageError: `partial_dim` is not in 1..`dim`, or `qk_dim` is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import SHSA
        >>> attention = SHSA(dim=64, partial_dim=16)
        >>> attention(torch.randn(2, 64, 7, 5)).shape
        torch.Size([2, 64, 7, 5])
    """

    def __init__(self, dim: int, partial_dim: int | None = None, qk_dim: int = 16):
        super().__init__()
        if partial_dim is None:
            partial_dim = max(1, dim * 3 // 14)
        if not 1 <= partial_dim <= dim:
            raise UsageError(f"partial_dim must be between 1 and dim={dim}, got {partial_dim}")
        if qk_dim < 1:
            raise UsageError(f"qk_dim must be at least 1, got {qk_dim}")
        self.dim = dim
        self.partial_dim = partial_dim
        self.qk_dim = qk_dim
        self.norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvNorm(partial_dim, 2 * qk_dim + partial_dim)
        self.act = nn.ReLU(inplace=True)
        self.proj = ConvNorm(dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        B, _, H, W = x.shape
        attending, waiting = torch.split(x, [self.partial_dim, self.dim - self.partial_dim], dim=1)
        tokens = self.qkv(self.norm(attending)).flatten(2).transpose(1, 2)  # (B, N, 2 qk_dim + partial_dim)
        q, k, v = torch.split(tokens, [self.qk_dim, self.qk_dim, self.partial_dim], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).reshape(B, self.partial_dim, H, W)
        return self.proj(self.act(torch.cat([attended, waiting], dim=1)))


class SHViTBlock(nn.Module):
    """SHViT's block: depthwise 3x3 convolution, single-head attention, feed-forward, each a residual branch.

    Every branch ends in a norm that starts at zero, as published: a fresh block is the identity.

    Args:
        dim: channels of the map.
        partial_dim: channels that attend; by default 3/14 of `dim`, the ratio of the paper.
        qk_dim: width of the queries and keys.
        attention: without it (the first stage of the paper's models) the middle branch is left out.
        ffn_ratio: hidden width of the feed-forward, as a multiple of `dim`.
        drop_path: probability with which a sample skips a branch in training.
        conv_norm_init: initial weight of the norm behind the depthwise convolution.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W.

    Raises:
        UsageError: as `SHSA`; or `partial_dim` is given to a block without attention.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import SHViTBlock
        >>> block = SHViTBlock(dim=64)
        >>> block(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(
        self,
        dim: int,
        partial_dim: int | None = None,
        qk_dim: int = 16,
        *,
        attention: bool = True,
        ffn_ratio: float = 2.0,
        drop_path: float = 0.0,
        conv_norm_init: float = 0.0,
    ):
        super().__init__()
        if partial_dim is not None and not attention:
            raise UsageError(f"a block without attention takes no partial_dim, got {partial_dim}")
        self.dwconv = ConvNorm(dim, dim, 3, groups=dim, norm_init=conv_norm_init)
        self.attn = SHSA(dim, partial_dim, qk_dim) if attention else None
        self.ffn = FeedForward(dim, int(dim * ffn_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x + self.drop_path(self.dwconv(x))
        if self.attn is not None:
            x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.ffn(x))


class PatchMerging(nn.Module):
    """Halve the map: widen fourfold, depthwise 3x3 of stride 2, squeeze-excite, project to `out_dim`."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        hidden_dim = 4 * dim
        self.conv1 = ConvNorm(dim, hidden_dim)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = ConvNorm(hidden_dim, hidden_dim, 3, stride=2, groups=hidden_dim)
        self.act2 = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(hidden_dim, 0.25)
        self.conv3 = ConvNorm(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        return self.conv3(self.se(x))


class Downsample(nn.Module):
    """Patch merging between an attention-free block at the old width and one at the new (section 3.3).

    The depthwise branches start at one here, as published; only the feed-forward's start at zero.
    """

    def __init__(self, dim: int, out_dim: int, ffn_ratio: float = 2.0):
        super().__init__()
        self.pre = SHViTBlock(dim, attention=False, ffn_ratio=ffn_ratio, conv_norm_init=1.0)
        self.merge = PatchMerging(dim, out_dim)
        self.post = SHViTBlock(out_dim, attention=False, ffn_ratio=ffn_ratio, conv_norm_init=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        return self.post(self.merge(self.pre(x)))
