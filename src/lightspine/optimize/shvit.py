"""Inference forms of SHViT's blocks."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.models.shvit import SHSA, Classifier, FeedForward, SHViT, SHViTBlock
from lightspine.optimize import target
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
        # A CUDA device computes channels-last maps, of which the tokens are a view.
        self.on_tokens = target.on_cuda(module.norm.weight)
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
        if self.on_tokens:
            return self._mix_tokens(x, add)
        attending, waiting = x.split_with_sizes(self.widths, dim=1)
        qkv = self.qkv(torch.group_norm(attending, 1, eps=self.eps)).flatten(2)
        q, k, v = qkv.split_with_sizes(self.sizes, dim=1)  # (B, channels, N)
        weights = (q.transpose(1, 2) @ k).softmax(dim=2)
        # This order of the product keeps the channels-last format.
        attended = (weights @ v.transpose(1, 2)).transpose(1, 2).view(attending.shape)
        return self.proj(self.act(torch.cat([attended, waiting], dim=1)), add)

    def _mix_tokens(self, x: Tensor, add: Tensor | None) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)
        attending, waiting = tokens.split_with_sizes(self.widths, dim=2)
        # A group norm with one group is a layer norm of all numbers of an image. PyTorch's group norm would
        # return, and leave to all that follows, a map that is not channels-last.
        numbers = attending.flatten(1)
        normed = F.layer_norm(numbers, numbers.shape[1:], eps=self.eps).view(attending.shape)
        maps = normed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        qkv = self.qkv(maps).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = qkv.split_with_sizes(self.sizes, dim=2)  # (B, N, channels)
        attended = (q @ k.transpose(1, 2)).softmax(dim=2) @ v
        mixed = self.act(torch.cat([attended, waiting], dim=2))
        return self.proj(mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), add)


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
    stem = pack_sequence(module.stem)
    if target.on_cuda(next(module.parameters())):
        stem.insert(0, target.ToChannelsLast().eval())
    module.stem = stem
    target.convolve_channels_last(module)
    return merge_distillation_heads(module)
