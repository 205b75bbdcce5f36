"""SHViT for inference."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.export.inference import inference_rule
from lightspine.export.inference.heads import average_heads
from lightspine.export.inference.norms import absorb_input, add_input, affine_of, scale_output
from lightspine.models._shvit_blocks import SHSA, SHViTBlock
from lightspine.models.shvit import Classifier, SHViT


@inference_rule(SHSA)
class FoldedSHSA(nn.Module):
    """`SHSA` whose norm's affine part and scale lie in the projection, without a change of layout."""

    def __init__(self, module: Any):
        super().__init__()
        self.sizes = [module.qk_dim, module.qk_dim, module.partial_dim]
        self.widths = [module.partial_dim, module.dim - module.partial_dim]
        self.eps = module.norm.eps
        self.qkv: nn.Conv2d = module.qkv.conv
        self.act = module.act
        self.proj: nn.Conv2d = module.proj.conv
        absorb_input(self.qkv, module.norm.weight, module.norm.bias)
        scale = torch.ones(sum(self.sizes), dtype=torch.float64, device=self.qkv.weight.device)
        scale[: module.qk_dim] = module.qk_dim**-0.5
        scale_output(self.qkv, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        attending, waiting = torch.split(x, self.widths, dim=1)
        qkv = self.qkv(F.group_norm(attending, 1, eps=self.eps)).flatten(2)
        q, k, v = torch.split(qkv, self.sizes, dim=1)  # (B, channels, N)
        weights = (q.transpose(1, 2) @ k).softmax(dim=2)
        attended = (v @ weights.transpose(1, 2)).view(attending.shape)
        return self.proj(self.act(torch.cat([attended, waiting], dim=1)))


@inference_rule(SHViTBlock)
class FoldedSHViTBlock(nn.Module):
    """`SHViTBlock` whose depthwise branch is one convolution with its residual connection."""

    def __init__(self, module: Any):
        super().__init__()
        self.dwconv: nn.Conv2d = module.dwconv.conv
        add_input(self.dwconv)
        self.attn = module.attn
        self.ffn = module.ffn

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = self.dwconv(x)
        if self.attn is not None:
            x = x + self.attn(x)
        return x + self.ffn(x)


@inference_rule(Classifier)
def fold_classifier(module: Classifier) -> nn.Module:
    """Fold the norm into the linear map behind it."""
    affine = affine_of(module.norm)
    if affine is None:
        return module
    absorb_input(module.fc, *affine)
    return module.fc


@inference_rule(SHViT)
def fold_model(module: SHViT) -> nn.Module:
    """Merge the classifiers of a distilled model."""
    return average_heads(module)
