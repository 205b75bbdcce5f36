"""Vision Mamba for inference."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.export.inference import inference_rule
from lightspine.export.inference.norms import scale_output, set_weights
from lightspine.models._vim_blocks import ScanDirection, VimMixer, at_least_float32
from lightspine.ops.selective_scan import scan


@inference_rule(ScanDirection)
class FoldedScanDirection(nn.Module):
    """`ScanDirection` with its state matrix computed and its kernel mirrored."""

    def __init__(self, module: ScanDirection):
        super().__init__()
        self.reverse = module.reverse
        self.sizes = [module.dt_rank, module.state_dim, module.state_dim]
        kernel = module.conv1d.weight.flip(2) if module.reverse else module.conv1d.weight
        self.reach = kernel.shape[2] - 1
        self.register_buffer("kernel", kernel.unsqueeze(2).contiguous())
        self.conv_bias = module.conv1d.bias
        self.x_proj = module.x_proj
        self.dt_weight, self.dt_bias = module.dt_proj.weight, module.dt_proj.bias
        self.register_buffer("A", -torch.exp(at_least_float32(module.A_log)))
        self.D = module.D

    kernel: Tensor
    A: Tensor

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `ScanDirection.project` does."""
        length = x.shape[1]
        image = x.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        u = F.conv2d(image, self.kernel, self.conv_bias, padding=(0, self.reach), groups=self.D.shape[0])
        first = self.reach if self.reverse else 0
        u = F.silu(u.squeeze(2)[:, :, first : first + length])
        step, B, C = self.x_proj(u.transpose(1, 2)).split(self.sizes, dim=2)
        delta = F.linear(step, self.dt_weight).transpose(1, 2)
        return u, delta, B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Mix tokens x and gate them with SiLU(z); all (B, L, D)."""
        u, delta, B, C = self.project(x)
        y = scan(u, delta, self.A, B, C, self.D, z.transpose(1, 2), self.dt_bias, True, self.reverse)
        return y.transpose(1, 2)


@inference_rule(VimMixer)
class FoldedVimMixer(nn.Module):
    """`VimMixer` whose halving and layer scale lie in its last projection."""

    def __init__(self, module: VimMixer):
        super().__init__()
        self.layout = module.layout
        self.in_proj, self.out_proj = module.in_proj, module.out_proj
        self.ahead, self.back = module.ahead, module.back
        if module.divide_out:
            set_weights(self.out_proj, self.out_proj.weight.double() / 2, None)
        if module.gamma is not None:
            scale_output(self.out_proj, module.gamma)
        self.A_back: Tensor | None
        log = module.A_log_back
        self.register_buffer("A_back", None if log is None else -torch.exp(at_least_float32(log)))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Mix a sequence of tokens (B, L, C)."""
        x, z = self.in_proj(x).chunk(2, dim=2)
        if self.A_back is not None:
            y = self._scan_shared(x, z, self.A_back)
        else:
            y = self.ahead(x, z)
            if self.back is not None:
                y = y + self.back(x, z)
        return self.out_proj(y)

    def _scan_shared(self, x: Tensor, z: Tensor, A_back: Tensor) -> Tensor:
        ahead: Any = self.ahead
        u, delta, B, C = ahead.project(x)
        z = z.transpose(1, 2)
        y = scan(u, delta, ahead.A, B, C, ahead.D, z, ahead.dt_bias, True, False)
        y = y + scan(u, delta, A_back, B, C, ahead.D, z, ahead.dt_bias, True, True)
        return y.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W), or tokens (B, L, C) where the mixer was made so."""
        if self.layout == "NLC":
            return self.forward_tokens(x)
        return self.forward_tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
