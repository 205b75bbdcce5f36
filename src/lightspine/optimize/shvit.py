"""Inference forms of SHViT's blocks."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.models.shvit import SHSA, Classifier, FeedForward, SHViT, SHViTBlock
from lightspine.optimize.folding import (
    add_identity,
    batch_norm_affine,
    merge_distillation_heads,
    scale_input,
    scale_output,
)
from lightspine.optimize.general import register_inference_form
from lightspine.optimize.packed import PackedConv2d, PackedPointwise, pack_sequence


@register_inference_form(SHSA)
class FoldedSHSA(nn.Module):
    """`SHSA` with the affine part of the norm and the scale of the queries folded into the projection."""

    def __init__(self, module: Any):
        super().__init__()
        self.sizes = [module.qk_dim, module.qk_dim, module.partial_dim]
        self.widths = [module.partial_dim, module.dim - module.partial_dim]
        self.eps = module.norm.eps
        qkv: nn.Conv2d = module.qkv.conv
        scale_input(qkv, module.norm.weight, module.norm.bias)
        scale = torch.ones(sum(self.sizes), dtype=torch.float64, device=qkv.weight.device)
        scale[: module.qk_dim] = module.qk_dim**-0.5
        scale_output(qkv, scale)
        self.qkv = PackedPointwise(qkv)
        self.act = module.act
        self.proj = PackedPointwise(module.proj.conv)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), with `add` added."""
        attending, waiting = x.split_with_sizes(self.widths, dim=1)
        qkv = self.qkv(torch.group_norm(attending, 1, eps=self.eps)).flatten(2)
        q, k, v = qkv.split_with_sizes(self.sizes, dim=1)  # (B, channels, N)
        weights = (q.transpose(1, 2) @ k).softmax(dim=2)
        # This order of the product keeps the channels-last format.
        attended = (weights @ v.transpose(1, 2)).transpose(1, 2).view(attending.shape)
        return self.proj(self.act(torch.cat([attended, waiting], dim=1)), add)


@register_inference_form(FeedForward)
class FoldedFeedForward(nn.Module):
    """`FeedForward` as two matrix products, with the residual addition fused into the second."""

    def __init__(self, module: Any):
        super().__init__()
        self.pw1 = PackedPointwise(module.pw1.conv, module.act)
        self.pw2 = PackedPointwise(module.pw2.conv)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W), with `add` added."""
        return self.pw2(self.pw1(x), add)


@register_inference_form(SHViTBlock)
class FoldedSHViTBlock(nn.Module):
    """`SHViTBlock` with the residual depthwise branch as one convolution."""

    def __init__(self, module: Any):
        super().__init__()
        add_identity(module.dwconv.conv)
        self.dwconv = PackedConv2d(module.dwconv.conv)
        self.attn = module.attn
        self.ffn = module.ffn

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = self.dwconv(x)
        if self.attn is not None:
            x = self.attn(x, x)
        return self.ffn(x, x)


@register_inference_form(Classifier)
def fold_classifier(module: Classifier) -> nn.Module:
    """Fold the BatchNorm into the linear layer."""
    affine = batch_norm_affine(module.norm)
    if affine is None:
        return module
    scale_input(module.fc, *affine)
    return module.fc


@register_inference_form(SHViT)
def pack_stem_and_merge_heads(module: SHViT) -> SHViT:
    """Pack the stem and merge the two classifiers of a distilled model."""
    module.stem = pack_sequence(module.stem)
    return merge_distillation_heads(module)
