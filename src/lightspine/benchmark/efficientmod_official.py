"""EfficientMod (Ma et al., ICLR 2024) with the operation order of the official code, as a baseline.

Tensors are (B, H, W, C) between the layers and are permuted to (B, C, H, W) and back around convolutions. The
context is repeated to the hidden width before the product, attention is not fused, and each residual branch
is scaled and added separately. `lightspine.models.efficientmod` computes the same network in another order.
"""

import copy
from typing import Any

import torch.nn as nn
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.models.efficientmod import EfficientMod, EfficientModBlock


class OfficialEfficientMod(nn.Module):
    """EfficientMod in the official operation order, on a copy of a model's layers: same weights, same logits.

    Args:
        model: an EfficientMod with "product" fusion, pooling and a classifier; it is copied.

    Shape:
        Input `(B, in_chans, H, W)`, output `(B, num_classes)`.

    Raises:
        UsageError: `model` is not such a model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not isinstance(model, EfficientMod) or not model.num_classes:
            raise UsageError(f"expected an EfficientMod with a classifier, got {type(model).__name__}")
        ours: Any = copy.deepcopy(model)
        self.patch_embed = _PatchEmbed(ours.stem)
        layers: list[nn.Module] = []
        for stage in ours.stages:
            if not isinstance(stage.downsample, nn.Identity):
                layers.append(_PatchEmbed(stage.downsample))
            layers += [
                _Modulation(block) if isinstance(block, EfficientModBlock) else _AttentionBlock(block)
                for block in stage.blocks
            ]
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = ours.norm, ours.head

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_chans, H, W)."""
        x = self.layers(self.patch_embed(x.permute(0, 2, 3, 1)))
        return self.head(self.norm(x).mean((1, 2)))


class _PatchEmbed(nn.Module):
    def __init__(self, ours: Any):
        super().__init__()
        self.proj, self.norm = ours.conv, ours.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class _Modulation(nn.Module):
    def __init__(self, ours: Any):
        super().__init__()
        if ours.mlp.sums:
            raise UsageError("expected fusion='product', as published, got 'sum'")
        self.norm, self.gamma_1 = ours.norm, ours.gamma
        self.context, self.expand_ratio = ours.mlp.context, ours.mlp.expand_ratio
        self.fc1, self.act, self.fc2 = ours.mlp.fc1, ours.mlp.act, ours.mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        context = self.context.f(y).permute(0, 3, 1, 2)
        context = self.context.act(self.context.conv(context)).permute(0, 2, 3, 1)
        context = self.context.g(context).repeat(1, 1, 1, self.expand_ratio)
        return x + self.gamma_1 * self.fc2(self.act(self.fc1(y)) * context)


class _AttentionBlock(nn.Module):
    def __init__(self, ours: Any):
        super().__init__()
        self.norm1, self.norm2, self.mlp = ours.norm1, ours.norm2, ours.mlp
        self.qkv, self.proj = ours.attn.qkv, ours.attn.proj
        self.num_heads, self.head_dim = ours.attn.num_heads, ours.attn.head_dim

    def _attend(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q @ k.transpose(2, 3)) * self.head_dim**-0.5).softmax(dim=3)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, H, W, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))
