"""Inference forms of EfficientMod's blocks."""

from typing import Any

import torch.nn as nn
from torch import Tensor

from lightspine.layers.attention import attention
from lightspine.models.efficientmod import (
    Attention,
    ConvNorm,
    EfficientMod,
    EfficientModAttentionBlock,
    EfficientModBlock,
    ModulationMlp,
)
from lightspine.optimize import target
from lightspine.optimize.folding import scale_output, set_weights
from lightspine.optimize.general import register_inference_form
from lightspine.optimize.packed import PackedBinaryLinear, PackedConv2d, PackedLinear


class FoldedModulation(nn.Module):
    """`ModulationMlp` with residual connection; the layer scale is folded into the last linear layer."""

    def __init__(self, module: ModulationMlp, gamma: Tensor):
        super().__init__()
        self.expand_ratio = module.expand_ratio
        self.sums = module.sums
        self.context = module.context
        fc1, fc2 = module.fc1, module.fc2
        scale_output(fc2, gamma)
        self.fc1: nn.Module
        if self.expand_ratio == 1:
            self.fc1 = PackedBinaryLinear(fc1, "add" if self.sums else "mul")
        else:
            self.fc1 = PackedLinear(fc1, module.act)
        self.fc2 = PackedBinaryLinear(fc2, "add")

    def forward(self, x: Tensor, add: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C), with `add` added."""
        context = self.context(x)
        if self.expand_ratio == 1:
            return self.fc2(self.fc1(x, context), add)
        value = self.fc1(x).unflatten(3, (self.expand_ratio, -1))
        context = context.unsqueeze(3)
        fused = value.add_(context) if self.sums else value.mul_(context)
        return self.fc2(fused.flatten(3), add)


@register_inference_form(EfficientModBlock)
class FoldedEfficientModBlock(nn.Module):
    """`EfficientModBlock` with the layer scale folded into its last linear layer."""

    def __init__(self, module: EfficientModBlock):
        super().__init__()
        self.norm = module.norm
        self.mlp = FoldedModulation(module.mlp, module.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        return self.mlp(self.norm(x), x).permute(0, 3, 1, 2)


@register_inference_form(Attention)
class FoldedAttention(nn.Module):
    """Inference form of EfficientMod's attention, with the residual addition inside.

    On a CPU the attention is two products, with the scale of the queries folded into their projection. On a
    CUDA device it is PyTorch's fused kernel, which never writes the matrix of weights.
    """

    def __init__(self, module: Attention):
        super().__init__()
        self.num_heads = module.num_heads
        self.inner = module.num_heads * module.head_dim
        self.fused = target.on_cuda(module.qkv.weight)
        if not self.fused:
            weight = module.qkv.weight.double().clone()
            weight[: self.inner] *= module.head_dim**-0.5
            set_weights(module.qkv, weight, None)
        self.qkv = PackedLinear(module.qkv)
        self.proj = PackedBinaryLinear(module.proj, "add")

    def forward(self, x: Tensor, add: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C), with `add` added."""
        tokens = self.qkv(x).flatten(1, 2)  # B N 3C
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in tokens.split(self.inner, dim=2)
        )
        out = attention(q, k, v) if self.fused else (q @ k.transpose(2, 3)).softmax(dim=3) @ v
        out = out.transpose(1, 2).flatten(2).unflatten(1, (x.shape[1], x.shape[2]))
        return self.proj(out, add)


@register_inference_form(EfficientModAttentionBlock)
class FoldedAttentionBlock(nn.Module):
    """`EfficientModAttentionBlock` with the residual additions fused into the last product of each branch."""

    def __init__(self, module: Any):
        super().__init__()
        self.norm1, self.norm2 = module.norm1, module.norm2
        self.attn = module.attn
        mlp: Any = module.mlp
        self.fc1 = PackedLinear(mlp.fc1, mlp.act)
        self.fc2 = PackedBinaryLinear(mlp.fc2, "add")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        x = self.attn(self.norm1(x), x)
        return self.fc2(self.fc1(self.norm2(x)), x).permute(0, 3, 1, 2)


@register_inference_form(ConvNorm)
def pack_convolution(module: Any) -> nn.Module:
    """Pack the convolution of the stem or a downsampling."""
    module.conv = PackedConv2d(module.conv)
    return module


@register_inference_form(EfficientMod)
def store_channels_last(model: EfficientMod) -> EfficientMod:
    """Store the weights of the convolutions in the memory format of the maps."""
    target.convolve_channels_last(model)
    return model
