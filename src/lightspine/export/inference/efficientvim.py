"""EfficientViM for inference."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.export.inference import inference_rule
from lightspine.export.inference.heads import average_heads
from lightspine.export.inference.norms import add_input, scale_output
from lightspine.models._efficientvim_blocks import (
    HSMSSD,
    NCSSD,
    ChannelNorm,
    EfficientViMBlock,
    FusionHead,
    PatchMerging,
)
from lightspine.models.efficientvim import EfficientViM


class _FoldedMixer(nn.Module):
    """What both mixers share; the norm before them is theirs, because they read it in two layouts.

    A is left out: the softmax over positions forgets what all positions have in common.
    """

    def __init__(self, module: HSMSSD | NCSSD, norm: ChannelNorm):
        super().__init__()
        self.norm = nn.LayerNorm(
            norm.weight.numel(), norm.eps, device=norm.weight.device, dtype=norm.weight.dtype
        )
        self.norm.weight.copy_(norm.weight.flatten())
        self.norm.bias.copy_(norm.bias.flatten())
        self.register_buffer("bcdt_weight", module.bcdt_proj.weight.flatten(1), persistent=True)
        self.dwconv = module.dwconv
        self.register_buffer("skip", module.D)
        self.out_proj = module.out_proj

    bcdt_weight: Tensor
    skip: Tensor

    def _read_write(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normed tokens (B, L, C), what they write to the states and read, both (B, N, L)."""
        height, width = x.shape[2], x.shape[3]
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        bcdt = F.linear(tokens, self.bcdt_weight).transpose(1, 2).unflatten(2, (height, width))
        b, c, dt = self.dwconv(bcdt).flatten(2).chunk(3, dim=1)
        return tokens, b * dt.softmax(dim=2), c


class FoldedHSMSSD(_FoldedMixer):
    """`HSMSSD` behind its norm, its output blended by a gate."""

    def __init__(self, module: HSMSSD, norm: ChannelNorm, gate: Tensor):
        super().__init__(module, norm)
        self.hz_proj = module.hz_proj
        self.register_buffer("gate", gate)

    gate: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gated map (B, C, H, W) and the hidden state (B, C, N), not gated."""
        tokens, write, read = self._read_write(x)
        h, z = self.hz_proj(write @ tokens).chunk(2, dim=2)
        state = self.out_proj(h * (F.silu(z) + self.skip))  # B N C
        # The gate meets N states in place of L positions.
        y = (state * self.gate).transpose(1, 2) @ read
        return y.view(x.shape), state.transpose(1, 2)


class FoldedNCSSD(_FoldedMixer):
    """`NCSSD` behind its norm, its output blended by a gate that lies in the last projection."""

    def __init__(self, module: NCSSD, norm: ChannelNorm, gate: Tensor):
        super().__init__(module, norm)
        self.uz_proj = module.uz_proj
        scale_output(self.out_proj, gate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gated map (B, C, H, W) and the hidden state (B, expand C, N)."""
        tokens, write, read = self._read_write(x)
        u, z = self.uz_proj(tokens).chunk(2, dim=2)
        state = write @ u  # B N C
        y = self.out_proj((read.transpose(1, 2) @ state + self.skip * u) * F.silu(z))
        return y.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3])), state.transpose(1, 2)


@inference_rule(EfficientViMBlock)
class FoldedEfficientViMBlock(nn.Module):
    """`EfficientViMBlock` whose gates a lie in the weights: `(1 - a) x + a f(x)`, `1 - a` a constant."""

    def __init__(self, module: Any):
        super().__init__()
        gates = module.alpha.double().sigmoid()
        self.dwconv1 = _blend_in(module.dwconv1.conv, gates[0])
        mixer: Any = FoldedHSMSSD if isinstance(module.mixer, HSMSSD) else FoldedNCSSD
        self.mixer = mixer(module.mixer, module.norm, gates[1].to(module.alpha.dtype))
        self.dwconv2 = _blend_in(module.dwconv2.conv, gates[2])
        self.ffn = module.ffn
        scale_output(self.ffn.fc2.conv, gates[3])
        kept = (1 - gates[[1, 3]]).to(module.alpha.dtype)[:, :, None, None]
        self.register_buffer("kept", kept)

    kept: Tensor

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map (B, C, H, W) and the mixer's hidden state (B, C, N)."""
        x = self.dwconv1(x)
        update, state = self.mixer(x)
        x = self.dwconv2(x * self.kept[0] + update)
        return x * self.kept[1] + self.ffn(x), state

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return self.forward_with_state(x)[0]


def _blend_in(conv: nn.Conv2d, gate: Tensor) -> nn.Conv2d:
    scale_output(conv, gate)
    add_input(conv, 1 - gate)
    return conv


@inference_rule(PatchMerging)
class FoldedPatchMerging(nn.Module):
    """`PatchMerging` whose depthwise branches are one convolution each with their residual connections."""

    def __init__(self, module: Any):
        super().__init__()
        self.dwconv1: nn.Conv2d = module.dwconv1.conv
        self.conv = module.conv
        self.dwconv2: nn.Conv2d = module.dwconv2.conv
        add_input(self.dwconv1)
        add_input(self.dwconv2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        return self.dwconv2(self.conv(self.dwconv1(x)))


@inference_rule(FusionHead)
def merge_classifiers(module: FusionHead) -> nn.Linear:
    """Return the weighted sum of the classifiers as one linear map of all their inputs in a row."""
    weights = module.weights.double().softmax(0)
    layers: list[Any] = list(module.fc)
    like = layers[0].weight
    merged = nn.Linear(sum(module.widths), len(like), device=like.device, dtype=like.dtype)
    scaled = [weight * fc.weight.double() for weight, fc in zip(weights, layers, strict=True)]
    merged.weight.copy_(torch.cat(scaled, dim=1))
    biases = [weight * fc.bias.double() for weight, fc in zip(weights, layers, strict=True)]
    merged.bias.copy_(torch.stack(biases).sum(0))
    return merged.eval()


@inference_rule(EfficientViM)
def fold_model(module: EfficientViM) -> nn.Module:
    """Merge the classifiers of a distilled model."""
    return average_heads(module)
