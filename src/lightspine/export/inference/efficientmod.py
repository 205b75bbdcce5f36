"""EfficientMod for inference."""

import torch.nn as nn
from torch import Tensor

from lightspine.export.inference import inference_rule
from lightspine.export.inference.norms import scale_output, set_weights
from lightspine.models._efficientmod_blocks import Attention, EfficientModBlock


@inference_rule(EfficientModBlock)
class FoldedEfficientModBlock(nn.Module):
    """`EfficientModBlock` whose layer scale lies in its last linear map."""

    def __init__(self, module: EfficientModBlock):
        super().__init__()
        self.norm = module.norm
        self.mlp = module.mlp
        scale_output(self.mlp.fc2, module.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        return (x + self.mlp(self.norm(x))).permute(0, 3, 1, 2)


@inference_rule(Attention)
class FoldedAttention(nn.Module):
    """`Attention` whose scale lies in its projection."""

    def __init__(self, module: Attention):
        super().__init__()
        self.num_heads = module.num_heads
        self.inner = module.num_heads * module.head_dim
        self.qkv = module.qkv
        self.proj = module.proj
        weight = self.qkv.weight.double().clone()
        weight[: self.inner] *= module.head_dim**-0.5
        set_weights(self.qkv, weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        tokens = self.qkv(x).flatten(1, 2)  # B N 3C
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in tokens.split(self.inner, dim=2)
        )
        out = (q @ k.transpose(2, 3)).softmax(dim=3) @ v
        out = out.transpose(1, 2).flatten(2).unflatten(1, (x.shape[1], x.shape[2]))
        return self.proj(out)
