"""Vim's bidirectional mixer and its block, usable by themselves."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.layers.recompute import recompute_before_scan
from lightspine.ops.selective_scan import scan

DIRECTIONS = ("v2", "v1", "one-way")
LAYOUTS = ("NCHW", "NLC")
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a `UsageError` that names the choices unless `value` is one of them."""
    if value not in choices:
        raise UsageError(f"unknown {argument} {value!r}: expected one of {', '.join(map(repr, choices))}")


# A dtype is unknown while torch.fx traces: it records one call instead of the branch.
@torch.fx.wrap
def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision tensors in float32 and all others as they are."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


class ScanDirection(nn.Module):
    """One direction of the mixer: causal depthwise convolution, SiLU, projections and the selective scan.

    `reverse=True` walks from the last token to the first. It equals flipping the sequence before and after,
    but nothing is flipped: the convolution looks ahead with its kernel mirrored and the scan runs backwards.

    Args:
        dim: number of channels D.
        state_dim: size of the state N of each channel.
        dt_rank: rank of the step's projection.
        conv_kernel: width of the convolution.
        reverse: walk backwards.
        recompute: keep only the arguments of `forward` for the backward.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        dt_rank: int,
        conv_kernel: int,
        reverse: bool = False,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.recompute = recompute
        self.dt_rank = dt_rank
        self.state_dim = state_dim
        self.conv1d = nn.Conv1d(dim, dim, conv_kernel, groups=dim)
        self.x_proj = nn.Linear(dim, dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(dt_rank, dim)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state_dim + 1).float()).repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.reset_steps()

    def reset_steps(self) -> None:
        """Draw the step's projection as published: ahead, steps start log-uniform in [0.001, 0.1].

        Backwards they start at softplus(0) = 0.69, because the published initialisation zeroes that bias.
        """
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        if self.reverse:
            nn.init.zeros_(self.dt_proj.bias)
            return
        step = (
            torch.empty_like(self.dt_proj.bias).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
        )
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is the step

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the scan's u and delta, (B, D, L), and its B and C, (B, 1, N, L), for tokens x (B, L, D)."""
        length = x.shape[1]
        # As a channels-last image of height 1: tokens keep their layout; on a CPU far faster than conv1d.
        image = x.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)
        weight = self.conv1d.weight.flip(2) if self.reverse else self.conv1d.weight
        reach = weight.shape[2] - 1
        u = F.conv2d(image, weight.unsqueeze(2), self.conv1d.bias, padding=(0, reach), groups=self.D.shape[0])
        first = reach if self.reverse else 0
        u = F.silu(u.squeeze(2)[:, :, first : first + length])
        projected = self.x_proj(u.transpose(1, 2))
        step, B, C = projected.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        # The bias goes into the scan, which adds it in float32.
        delta = F.linear(step, self.dt_proj.weight).transpose(1, 2)
        return u, delta, B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Mix tokens x and gate them with SiLU(z); all (B, L, D)."""
        if self.recompute and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return recompute_before_scan(self._mix, x, z)
        return self._mix(x, z)

    def _mix(self, x: Tensor, z: Tensor) -> Tensor:
        u, delta, B, C = self.project(x)
        A = -torch.exp(at_least_float32(self.A_log))
        D, bias, z = self.D, self.dt_proj.bias, z.transpose(1, 2)
        y = scan(u, delta, A, B, C, D, z, bias, True, self.reverse, keep=not self.recompute)
        return y.transpose(1, 2)


class VimMixer(nn.Module):
    """Bidirectional selective-scan mixer (Vision Mamba, section 3.3).

    A map is read as the sequence of its pixels, row by row; (B, C, H, W) of any size in and out.

    >>> import torch
    >>> from lightspine.blocks import VimMixer
    >>> mixer = VimMixer(64)
    >>> mixer(torch.zeros(1, 64, 7, 5)).shape
    torch.Size([1, 64, 7, 5])

    Args:
        dim: number of channels C.
        state_dim: size of the state N of each inner channel.
        expand: inner channels per channel.
        conv_kernel: width of the causal convolution.
        dt_rank: rank of the step's projection; `None` is ceil(dim / 16).
        directions: "v2" scans ahead and backwards, each with its own convolution, projections, A and D;
            "v1" shares all but A; "one-way" scans ahead only.
        divide_out: "v2" only: halve the sum of both directions, as all released models do; `None` is `True`
            there.
        layer_scale: initial value of a learned factor per channel on the output; `None` has no factor.
        reverse: "one-way" only: walk from the last pixel to the first.
        recompute: keep nothing of a direction for the backward but its input and gate; convolution, SiLU,
            projections and steps are computed again, as in the paper. `False` keeps them: a little faster,
            but with 192 channels some 20,100 bytes per token (float32) of a `VimBlock` in place of 6,916.
        layout: "NCHW", or "NLC" to take and give tokens (B, L, C).

    Raises:
        UsageError: an unknown choice, or an option that the chosen directions do not have.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        directions: str = "v2",
        divide_out: bool | None = None,
        layer_scale: float | None = None,
        reverse: bool = False,
        recompute: bool = True,
        layout: str = "NCHW",
    ) -> None:
        super().__init__()
        check_choice("directions", directions, DIRECTIONS)
        check_choice("layout", layout, LAYOUTS)
        if divide_out is not None and directions != "v2":
            raise UsageError(f"divide_out belongs to directions 'v2': received it with {directions!r}")
        if reverse and directions != "one-way":
            raise UsageError(f"reverse belongs to directions 'one-way': received it with {directions!r}")
        self.layout = layout
        self.recompute = recompute
        self.directions = directions
        self.divide_out = directions == "v2" and divide_out is not False
        inner, rank = expand * dim, math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.ahead = ScanDirection(inner, state_dim, rank, conv_kernel, reverse, recompute)
        self.back = (
            ScanDirection(inner, state_dim, rank, conv_kernel, True, recompute)
            if directions == "v2"
            else None
        )
        self.A_log_back = nn.Parameter(self.ahead.A_log.detach().clone()) if directions == "v1" else None
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Mix a sequence of tokens (B, L, C)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if self.A_log_back is not None:
            y = self._scan_shared(x, z, self.A_log_back)
        else:
            y = self.ahead(x, z)
            if self.back is not None:
                y = y + self.back(x, z)
                if self.divide_out:
                    y = y / 2
        y = self.out_proj(y)
        return y if self.gamma is None else y * self.gamma

    def _scan_shared(self, x: Tensor, z: Tensor, A_log_back: Tensor) -> Tensor:
        """Scan the same projections ahead and backwards, each with its own A."""
        if self.recompute and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return recompute_before_scan(self._mix_shared, x, z, A_log_back)
        return self._mix_shared(x, z, A_log_back)

    def _mix_shared(self, x: Tensor, z: Tensor, A_log_back: Tensor) -> Tensor:
        u, delta, B, C = self.ahead.project(x)
        D, bias, z = self.ahead.D, self.ahead.dt_proj.bias, z.transpose(1, 2)
        A, A_back = -torch.exp(at_least_float32(self.ahead.A_log)), -torch.exp(at_least_float32(A_log_back))
        keep = not self.recompute
        y = scan(u, delta, A, B, C, D, z, bias, True, False, keep=keep)
        y = y + scan(u, delta, A_back, B, C, D, z, bias, True, True, keep=keep)
        return y.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W), or tokens (B, L, C) when built with `layout="NLC"`."""
        if self.layout == "NLC":
            return self.forward_tokens(x)
        return self.forward_tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class VimBlock(nn.Module):
    """Normalise, mix, add (Vision Mamba, algorithm 1): (B, C, H, W) of any size in and out.

    The input is the residual stream, best kept in float32: norm and mixer work in the dtype of the weights.

    >>> import torch
    >>> from lightspine.blocks import VimBlock
    >>> block = VimBlock(64)
    >>> block(torch.zeros(1, 64, 7, 5)).shape
    torch.Size([1, 64, 7, 5])

    Args:
        dim: number of channels C.
        state_dim: see `VimMixer`, as all up to `layer_scale`.
        expand: see `VimMixer`.
        conv_kernel: see `VimMixer`.
        dt_rank: see `VimMixer`.
        directions: see `VimMixer`.
        divide_out: see `VimMixer`.
        layer_scale: see `VimMixer`.
        reverse: see `VimMixer`.
        recompute: see `VimMixer`.
        norm: "rms" or "layer".
        drop_path: probability of dropping the mixer's output, per sample, in training.
        layout: "NCHW", or "NLC" to take and give tokens (B, L, C).

    Raises:
        UsageError: an unknown choice, or an option that the chosen directions do not have.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        directions: str = "v2",
        divide_out: bool | None = None,
        layer_scale: float | None = None,
        reverse: bool = False,
        recompute: bool = True,
        norm: str = "rms",
        drop_path: float = 0.0,
        layout: str = "NCHW",
    ) -> None:
        super().__init__()
        check_choice("norm", norm, tuple(NORMS))
        check_choice("layout", layout, LAYOUTS)
        self.layout = layout
        self.norm = NORMS[norm](dim, eps=1e-5)
        self.mixer = VimMixer(
            dim,
            state_dim,
            expand,
            conv_kernel,
            dt_rank,
            directions,
            divide_out,
            layer_scale,
            reverse,
            recompute,
            layout="NLC",
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Run on tokens (B, L, C)."""
        return x + self.drop_path(self.mixer(self.norm(x.to(self.norm.weight.dtype))))

    def forward(self, x: Tensor) -> Tensor:
        """Run on a map (B, C, H, W), or on tokens (B, L, C) when built with `layout="NLC"`."""
        if self.layout == "NLC":
            return self.forward_tokens(x)
        return self.forward_tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class VimLayerPair(nn.Module):
    """Two one-way blocks on the same stream, one ahead and one backwards, summed.

    The paper's "bidirectional layer" (ablation of section 4). Each block adds the stream to its output, so
    that the stream doubles with each pair, as published.

    Args:
        dim: number of channels C.
        state_dim: see `VimMixer`, as all up to `layer_scale`.
        expand: see `VimMixer`.
        conv_kernel: see `VimMixer`.
        dt_rank: see `VimMixer`.
        layer_scale: see `VimMixer`.
        recompute: see `VimMixer`.
        norm: "rms" or "layer".
        drop_path: probability of dropping each mixer's output, per sample, in training: (ahead, backwards).
        layout: "NCHW", or "NLC" to take and give tokens (B, L, C).
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        layer_scale: float | None = None,
        recompute: bool = True,
        norm: str = "rms",
        drop_path: tuple[float, float] = (0.0, 0.0),
        layout: str = "NCHW",
    ) -> None:
        super().__init__()
        self.ahead, self.back = (
            VimBlock(
                dim,
                state_dim,
                expand,
                conv_kernel,
                dt_rank,
                "one-way",
                layer_scale=layer_scale,
                reverse=reverse,
                recompute=recompute,
                norm=norm,
                drop_path=rate,
                layout=layout,
            )
            for reverse, rate in zip((False, True), drop_path, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run on a map (B, C, H, W), or on tokens (B, L, C) when built with `layout="NLC"`."""
        return self.ahead(x) + self.back(x)
