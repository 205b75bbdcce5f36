"""Inference forms of VMamba's blocks."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.models.vmamba import SS2D, VMamba, VSSBlock
from lightspine.ops.cross_scan import projected_cross_scan
from lightspine.optimize import target
from lightspine.optimize.general import register_inference_form
from lightspine.optimize.norms import FusedNorm, can_fuse_norm
from lightspine.optimize.packed import PackedConv2d, PackedLinear, can_fuse


@register_inference_form(SS2D)
class FoldedSS2D(nn.Module):
    """`SS2D` with precomputed A and packed layers."""

    def __init__(self, module: SS2D):
        super().__init__()
        self.directions = module.directions
        self.scan_order = module.scan_order
        self.gated = module.gate != "none"
        gate_proj: Any = module.gate_proj
        self.in_proj = PackedLinear(module.in_proj)
        self.gate_proj = PackedLinear(gate_proj, module.gate_act) if self.gated else nn.Identity()
        self.conv: nn.Module = module.act
        if isinstance(module.conv, nn.Conv2d):
            fused = can_fuse(module.act)
            conv = PackedConv2d(module.conv, module.act if fused else None)
            self.conv = conv if fused else nn.Sequential(conv, module.act)
        self.x_proj = PackedLinear(module.x_proj)
        self.out_norm, self.out_act = module.out_norm, module.out_act
        self.converts = can_fuse_norm(module.out_norm)
        if self.converts:
            norm: Any = module.out_norm
            self.out_norm = FusedNorm(norm)
        self.out_norm_takes_nchw = module.out_norm_takes_nchw
        self.out_proj = PackedLinear(module.out_proj)
        self.register_buffer("dt_weight", module.dt_weight.transpose(1, 2).contiguous())
        # In the dtype of the scan's state, to which the kernels would convert them at every call.
        dtype = torch.promote_types(module.A_log.dtype, torch.float32)
        self.register_buffer("A", -torch.exp(module.A_log.to(dtype)))
        self.register_buffer("D", module.D.detach().to(dtype).view(module.directions, -1))
        self.register_buffer("dt_bias", module.dt_bias.detach().to(dtype))

    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)  # B H W C
        u = self.conv(self.in_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        projected = self.x_proj(u).unflatten(3, (self.directions, -1))
        y = projected_cross_scan(u, projected, self.dt_weight, self.A, self.D, self.dt_bias, self.scan_order)
        if not self.converts:
            y = y.to(u.dtype)
        if self.out_norm_takes_nchw:
            y = self.out_norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            y = self.out_norm(y)
        y = self.out_act(y)
        if self.gated:
            y = y * self.gate_proj(x)
        return self.out_proj(y).permute(0, 3, 1, 2)


@register_inference_form(VSSBlock)
def fuse_residual(module: VSSBlock) -> nn.Module:
    """On a CUDA device, add to the residual stream and normalize the sum in one launch."""
    return FusedVSSBlock(module) if can_fuse_norm(module.norm2) else module


class FusedVSSBlock(nn.Module):
    """`VSSBlock` with the first residual addition and the second norm fused."""

    def __init__(self, module: Any):
        super().__init__()
        self.norm1, self.ssm, self.mlp = module.norm1, module.ssm, module.mlp
        self.norm2 = FusedNorm(module.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        tokens = x.permute(0, 2, 3, 1)
        update = self.ssm(self.norm1(tokens).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tokens, normed = self.norm2.add(tokens, update)
        return (tokens + self.mlp(normed)).permute(0, 3, 1, 2)


@register_inference_form(VMamba)
def pack_convolutions(model: VMamba) -> VMamba:
    """Pack the convolutions of the stem and between the stages."""
    stages: Any = model.stages
    for part in (model.stem, *(stage.downsample for stage in stages)):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Conv2d):
                setattr(part, name, PackedConv2d(layer))
    target.convolve_channels_last(model)
    return model
