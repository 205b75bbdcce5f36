"""Inference forms of Vim's blocks."""

from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.models.vim import (
    NORMS,
    ScanDirection,
    Vim,
    VimBlock,
    VimMixer,
    at_least_float32,
    mix_bidirectionally,
)
from lightspine.ops.dispatch import runs_on_triton
from lightspine.ops.memory_format import channels_last
from lightspine.ops.selective_scan import scan
from lightspine.optimize import target
from lightspine.optimize.folding import scale_output, set_weights
from lightspine.optimize.general import register_inference_form
from lightspine.optimize.norms import FusedNorm, can_fuse_norm
from lightspine.optimize.packed import PackedConv2d, PackedLinear


@register_inference_form(ScanDirection)
class FoldedScanDirection(nn.Module):
    """`ScanDirection` with precomputed A, mirrored kernel and packed layers."""

    def __init__(self, module: ScanDirection):
        super().__init__()
        self.reverse = module.reverse
        self.sizes = [module.dt_rank, module.state_dim, module.state_dim]
        self.reach = module.conv1d.weight.shape[2] - 1
        # As in `ScanDirection`, the tokens are a channels-last image of height 1.
        dim, kernel = module.D.shape[0], module.conv1d.weight
        conv = nn.Conv2d(dim, dim, (1, self.reach + 1), padding=(0, self.reach), groups=dim, device="meta")
        conv.weight = nn.Parameter((kernel.flip(2) if module.reverse else kernel).unsqueeze(2).contiguous())
        conv.bias = module.conv1d.bias
        self.conv = PackedConv2d(conv, nn.SiLU())
        self.x_proj = PackedLinear(module.x_proj)
        # The scan adds the bias in float32. It would convert its parameters at every call.
        dt_proj: Any = module.dt_proj
        bias, dt_proj.bias = dt_proj.bias, None
        self.register_buffer("dt_bias", at_least_float32(bias.detach()))
        self.dt_proj = PackedLinear(dt_proj)
        self.register_buffer("A", -torch.exp(at_least_float32(module.A_log)))
        self.register_buffer("D", at_least_float32(module.D.detach()))

    A: Tensor
    D: Tensor
    dt_bias: Tensor

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map tokens x (B, L, D) to the scan's u and delta, (B, D, L), and B and C, (B, 1, N, L)."""
        length = x.shape[1]
        image = channels_last(x.transpose(1, 2).unsqueeze(2))
        first = self.reach if self.reverse else 0
        u = self.conv(image).squeeze(2)[:, :, first : first + length]
        step, B, C = self.x_proj(u.transpose(1, 2)).split(self.sizes, dim=2)
        delta = self.dt_proj(step).transpose(1, 2)
        return u, delta, B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)

    def filters(self) -> Tensor:
        """Return the filters of the convolution as published, not mirrored: (1, D, W)."""
        filters = self.conv.weight[:, 0].transpose(0, 1)
        return filters.flip(2) if self.reverse else filters

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Scan tokens x and multiply by SiLU(z); all (B, L, D)."""
        u, delta, B, C = self.project(x)
        y = scan(u, delta, self.A, B, C, self.D, z.transpose(1, 2), self.dt_bias, True, self.reverse)
        return y.transpose(1, 2)


class BothDirections(nn.Module):
    """Parameters of both directions of a mixer, joined for the kernels that run them at once.

    Both projections to dt, B and C are one product with a block-diagonal matrix, whose rows are ordered so
    that its output is read in place: dt of both directions, B of both, C of both.
    """

    def __init__(self, ahead: FoldedScanDirection, back: FoldedScanDirection):
        super().__init__()
        directions: Any = (ahead, back)
        self.sizes = [2 * size for size in ahead.sizes]
        self.state_dim = ahead.sizes[1]
        joined = {
            "conv_weight": torch.cat([d.filters() for d in directions]),
            "conv_bias": torch.stack([d.conv.bias for d in directions]),
            "x_weight": _interleave([d.x_proj.weight for d in directions], ahead.sizes),
            "dt_weight": torch.block_diag(*(d.dt_proj.weight for d in directions)),
            "A": torch.cat([d.A for d in directions]),
            "D": torch.cat([d.D for d in directions]),
            "dt_bias": torch.cat([d.dt_bias for d in directions]),
        }
        for name, tensor in joined.items():
            self.register_buffer(name, tensor.detach().contiguous())

    conv_weight: Tensor
    conv_bias: Tensor
    x_weight: Tensor
    dt_weight: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map convolved tokens (B, L, 2 D) to the inputs of dt, (B, L, 2 R), and B and C, (B, 2, N, L)."""
        low_rank, *B_and_C = F.linear(u, self.x_weight).split(self.sizes, dim=2)
        B, C = (part.unflatten(2, (2, self.state_dim)).permute(0, 2, 3, 1) for part in B_and_C)
        return low_rank, B, C

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Run both directions on tokens x and multiply by SiLU(z); all (B, L, D)."""
        return mix_bidirectionally(
            x,
            z,
            self.conv_weight,
            self.conv_bias,
            self.project,
            self.dt_weight,
            self.A,
            self.D,
            self.dt_bias,
        )


def _interleave(weights: list[Tensor], sizes: list[int]) -> Tensor:
    """Return the matrix that maps both inputs (2 D) to the parts of both outputs, part by part."""
    ahead, back = weights
    zeros = torch.zeros_like(ahead)
    rows = zip(
        torch.cat([ahead, zeros], dim=1).split(sizes),
        torch.cat([zeros, back], dim=1).split(sizes),
        strict=True,
    )
    return torch.cat([part for pair in rows for part in pair])


@register_inference_form(VimMixer)
class FoldedVimMixer(nn.Module):
    """`VimMixer` with the halving of the sum and the layer scale folded into the last projection."""

    def __init__(self, module: VimMixer):
        super().__init__()
        self.layout = module.layout
        out_proj = module.out_proj
        self.ahead, self.back = module.ahead, module.back
        if module.divide_out:
            set_weights(out_proj, out_proj.weight.double() / 2, None)
        if module.gamma is not None:
            scale_output(out_proj, module.gamma)
        self.out_proj = PackedLinear(out_proj)
        self.in_proj: nn.Module | None = None
        self.both: nn.Module | None = None
        if target.on_cuda(module.in_proj.weight):
            # Its kernels read both halves in place.
            self.in_proj = PackedLinear(module.in_proj)
            if self.back is not None:
                ahead, back = cast(tuple[FoldedScanDirection, ...], (self.ahead, self.back))
                self.both = BothDirections(ahead, back)
        else:
            # Two products instead of one: both halves are contiguous for the convolution and the scan.
            self.x_part, self.z_part = (PackedLinear(half) for half in _halves(module.in_proj))
        self.A_back: Tensor | None
        log = module.A_log_back
        self.register_buffer("A_back", None if log is None else -torch.exp(at_least_float32(log)))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Mix tokens (B, L, C)."""
        if self.in_proj is None:
            x, z = self.x_part(x), self.z_part(x)
        else:
            x, z = self.in_proj(x).chunk(2, dim=2)
        if self.A_back is not None:
            return self.out_proj(self._scan_shared(x, z, self.A_back))
        return self.out_proj(self._scan_directions(x, z))

    def _scan_directions(self, x: Tensor, z: Tensor) -> Tensor:
        if self.both is not None and runs_on_triton(x):
            return self.both(x, z)
        y = self.ahead(x, z)
        return y if self.back is None else y + self.back(x, z)

    def _scan_shared(self, x: Tensor, z: Tensor, A_back: Tensor) -> Tensor:
        ahead: Any = self.ahead
        u, delta, B, C = ahead.project(x)
        z = z.transpose(1, 2)
        y = scan(u, delta, ahead.A, B, C, ahead.D, z, ahead.dt_bias, True, False)
        y = y + scan(u, delta, A_back, B, C, ahead.D, z, ahead.dt_bias, True, True)
        return y.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W), or tokens (B, L, C) with `layout="NLC"`."""
        if self.layout == "NLC":
            return self.forward_tokens(x)
        return self.forward_tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


@register_inference_form(VimBlock)
def fuse_norm(module: VimBlock) -> VimBlock:
    """On a CUDA device, normalize the float32 residual stream and convert it in one launch."""
    if can_fuse_norm(module.norm, tuple(NORMS.values())):
        norm: Any = FusedNorm(module.norm)
        module.norm = norm
    return module


@register_inference_form(Vim)
def pack_patch_embedding(model: Vim) -> Vim:
    """Pack the convolution that embeds the patches."""
    stem: Any = PackedConv2d(model.stem)
    model.stem = stem
    return model


def _halves(linear: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Split a linear layer without bias into the layers of the first and second half of its outputs."""
    first, second = nn.Linear(1, 1, bias=False, device="meta"), nn.Linear(1, 1, bias=False, device="meta")
    weight = linear.weight.detach().chunk(2)
    first.weight, second.weight = (nn.Parameter(half.clone()) for half in weight)
    return first, second
