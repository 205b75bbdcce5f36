"""Inference forms of EfficientViM's blocks."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.models.efficientvim import (
    HSMSSD,
    NCSSD,
    ChannelNorm,
    EfficientViM,
    EfficientViMBlock,
    FusionHead,
    PatchMerging,
    StatefulEfficientViMBlock,
    Stem,
)
from lightspine.ops.derivatives import in_transform
from lightspine.optimize import target
from lightspine.optimize.folding import add_identity, merge_distillation_heads, scale_output
from lightspine.optimize.general import register_inference_form
from lightspine.optimize.packed import PackedConv2d, PackedLinear, PackedPointwise, pack_sequence


class _FoldedMixer(nn.Module):
    """Base class of the mixers; it includes the norm before the mixer and uses its output in two layouts.

    A is omitted: it is the same at all positions, so the softmax over positions cancels it.
    """

    def __init__(self, module: HSMSSD | NCSSD, norm: ChannelNorm):
        super().__init__()
        self.norm = nn.LayerNorm(
            norm.weight.numel(), norm.eps, device=norm.weight.device, dtype=norm.weight.dtype
        )
        self.norm.weight.copy_(norm.weight.flatten())
        self.norm.bias.copy_(norm.bias.flatten())
        self.bcdt_proj = PackedPointwise(module.bcdt_proj)
        self.dwconv = PackedConv2d(module.dwconv)
        self.register_buffer("skip", module.D)
        self.on_cuda = target.on_cuda(module.D)

    skip: Tensor

    def _read_write(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalized tokens (B, L, C) and their write and read weights, both (B, L, N)."""
        tokens = self.norm(x.permute(0, 2, 3, 1))
        bcdt = self.dwconv(self.bcdt_proj(tokens.permute(0, 3, 1, 2)))
        b, c, dt = bcdt.permute(0, 2, 3, 1).flatten(1, 2).chunk(3, dim=2)
        return tokens.flatten(1, 2), b * dt.softmax(dim=1), c


class FoldedHSMSSD(_FoldedMixer):
    """Norm and `HSMSSD` with the block's gate applied to the output."""

    def __init__(self, module: HSMSSD, norm: ChannelNorm, gate: Tensor):
        super().__init__(module, norm)
        self.hz_proj = PackedLinear(module.hz_proj)
        self.out_proj = PackedLinear(module.out_proj)
        self.register_buffer("gate", gate)

    gate: Tensor

    def forward(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return `kept * x` plus the gated map (B, C, H, W), and the hidden state (B, C, N), not gated."""
        tokens, write, read = self._read_write(x)
        h, z = self.hz_proj(write.transpose(1, 2) @ tokens).chunk(2, dim=2)
        state = self.out_proj(h * (F.silu(z) + self.skip))  # B N C
        # The gate is applied to N states instead of L positions.
        gated = state * self.gate
        x = x.permute(0, 2, 3, 1) * kept
        # In place on a CUDA device: otherwise PyTorch copies x before it adds the product. Autocast gives
        # operands of several dtypes, and does not convert those of an operation in place.
        in_place = self.on_cuda and x.dtype == read.dtype == gated.dtype and not in_transform()
        add_product = Tensor.baddbmm_ if in_place else torch.baddbmm
        y = add_product(x.flatten(1, 2), read, gated)
        return y.view(x.shape).permute(0, 3, 1, 2), state.transpose(1, 2)


class FoldedNCSSD(_FoldedMixer):
    """Norm and `NCSSD` with the block's gate folded into the last projection."""

    def __init__(self, module: NCSSD, norm: ChannelNorm, gate: Tensor):
        super().__init__(module, norm)
        self.uz_proj = PackedLinear(module.uz_proj)
        scale_output(module.out_proj, gate)
        self.out_proj = PackedLinear(module.out_proj)

    def forward(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return `kept * x` plus the gated map (B, C, H, W), and the hidden state (B, expand C, N)."""
        tokens, write, read = self._read_write(x)
        u, z = self.uz_proj(tokens).chunk(2, dim=2)
        state = write.transpose(1, 2) @ u  # B N C
        y = self.out_proj((read @ state + self.skip * u) * F.silu(z))
        x = x.permute(0, 2, 3, 1)
        y = torch.addcmul(y.view(x.shape), x, kept)
        return y.permute(0, 3, 1, 2), state.transpose(1, 2)


@register_inference_form(EfficientViMBlock)
class FoldedEfficientViMBlock(nn.Module):
    """`EfficientViMBlock`, `(1 - a) x + a f(x)` per branch, with the gates a folded into the weights."""

    def __init__(self, module: Any):
        super().__init__()
        gates = module.alpha.double().sigmoid()
        self.dwconv1 = _blend_in(module.dwconv1.conv, gates[0])
        mixer: Any = FoldedHSMSSD if isinstance(module.mixer, HSMSSD) else FoldedNCSSD
        self.mixer = mixer(module.mixer, module.norm, gates[1].to(module.alpha.dtype))
        self.dwconv2 = _blend_in(module.dwconv2.conv, gates[2])
        scale_output(module.ffn.fc2.conv, gates[3])
        self.fc1 = PackedPointwise(module.ffn.fc1.conv, module.ffn.fc1.act)
        self.fc2 = PackedPointwise(module.ffn.fc2.conv)
        self.register_buffer("kept", (1 - gates[[1, 3]]).to(module.alpha.dtype))
        self.on_cuda = target.on_cuda(module.alpha)

    kept: Tensor

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map (B, C, H, W) and the mixer's hidden state (B, C, N)."""
        x, state = self.mixer(self.dwconv1(x), self.kept[0])
        x, kept = self.dwconv2(x), self.kept[1, :, None, None]
        if self.on_cuda:
            # One launch scales and adds. A CPU adds within the product instead.
            return torch.addcmul(self.fc2(self.fc1(x)), x, kept), state
        return self.fc2(self.fc1(x), x * kept), state

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return self.forward_with_state(x)[0]


@register_inference_form(StatefulEfficientViMBlock)
class FoldedStatefulBlock(FoldedEfficientViMBlock):
    """`FoldedEfficientViMBlock` that returns the mixer's hidden state too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the map (B, C, H, W) and the mixer's hidden state (B, C, N)."""
        return self.forward_with_state(x)


def _blend_in(conv: nn.Conv2d, gate: Tensor) -> PackedConv2d:
    scale_output(conv, gate)
    add_identity(conv, 1 - gate)
    return PackedConv2d(conv)


@register_inference_form(PatchMerging)
def pack_merging(module: Any) -> nn.Module:
    """Return packed layers; each residual depthwise branch becomes one convolution."""
    add_identity(module.dwconv1.conv)
    add_identity(module.dwconv2.conv)
    return pack_sequence(module.dwconv1, module.conv, module.dwconv2)


@register_inference_form(Stem)
def pack_stem(module: Stem) -> nn.Module:
    """Pack the convolutions."""
    return pack_sequence(module)


@register_inference_form(FusionHead)
def merge_classifiers(module: FusionHead) -> nn.Linear:
    """Return the weighted sum of the classifiers as one linear layer of their concatenated inputs."""
    weights = module.weights.double().softmax(0)
    layers: list[Any] = list(module.fc)
    like = layers[0].weight
    merged = nn.Linear(sum(module.widths), len(like), device=like.device, dtype=like.dtype)
    scaled = [weight * fc.weight.double() for weight, fc in zip(weights, layers, strict=True)]
    merged.weight.copy_(torch.cat(scaled, dim=1))
    biases = [weight * fc.bias.double() for weight, fc in zip(weights, layers, strict=True)]
    merged.bias.copy_(torch.stack(biases).sum(0))
    return merged.eval()


@register_inference_form(EfficientViM)
def merge_heads(module: EfficientViM) -> EfficientViM:
    """Merge the two classifiers of a distilled model, and store convolutions in the format of the maps."""
    target.convolve_channels_last(module)
    return merge_distillation_heads(module)
