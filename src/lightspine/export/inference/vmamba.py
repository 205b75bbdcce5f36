"""VMamba for inference."""

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.export.inference import inference_rule
from lightspine.models._vmamba_blocks import SS2D
from lightspine.ops.cross_scan import cross_scan


@inference_rule(SS2D)
class FoldedSS2D(nn.Module):
    """`SS2D` with its state matrices computed."""

    def __init__(self, module: SS2D):
        super().__init__()
        self.directions = module.directions
        self.scan_order = module.scan_order
        self.sizes = [module.dt_rank, module.state_dim, module.state_dim]
        self.gated = module.gate != "none"
        self.in_proj, self.gate_proj, self.gate_act = module.in_proj, module.gate_proj, module.gate_act
        self.conv, self.act, self.x_proj = module.conv, module.act, module.x_proj
        self.out_norm, self.out_act, self.out_proj = module.out_norm, module.out_act, module.out_proj
        self.dt_weight, self.dt_bias = module.dt_weight, module.dt_bias
        dtype = torch.promote_types(module.A_log.dtype, torch.float32)
        self.register_buffer("A", -torch.exp(module.A_log.to(dtype)))
        self.register_buffer("D", module.D.view(module.directions, -1))

    A: Tensor
    D: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)  # B H W C
        u = self.act(self.conv(self.in_proj(x)))
        projected = self.x_proj(u).unflatten(3, (self.directions, -1))
        dt, B, C = projected.split(self.sizes, dim=4)
        delta = torch.einsum("bhwkr,kdr->bhwkd", dt, self.dt_weight)
        y = cross_scan(u, delta, self.A, B, C, self.D, self.dt_bias, True, self.scan_order)
        y = self.out_act(self.out_norm(y.to(u.dtype)))
        if self.gated:
            y = y * self.gate_act(self.gate_proj(x))
        return self.out_proj(y).permute(0, 3, 1, 2)
