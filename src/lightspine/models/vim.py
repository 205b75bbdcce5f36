"""Vision Mamba (Vim): bidirectional selective-scan blocks on a sequence of patches and a class token.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", Zhu et
al., ICML 2024, arXiv:2401.09417. Official code: https://github.com/hustvl/Vim (Apache-2.0).

Differences from the official code, with the same outputs:

- A block adds its own output to the residual stream; the official block adds the previous block's output
  before its norm. The published drop-path rates are then linspace(0, rate, depth).
- Any input size: the position table is resized in `forward`, except for the row of the class token.
- In "layer-pairs" drop path applies to the layer's own output instead of that of the previous pair.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.layers.arguments import check_choice, check_images
from lightspine.layers.blocks import init_dt_bias
from lightspine.layers.checkpointing import checkpoint_module, checkpoint_scan
from lightspine.layers.plain import is_plain
from lightspine.models.registry import Published, StateDict, build_model, register_model
from lightspine.ops.bidirectional_scan import bidirectional_scan
from lightspine.ops.causal_conv1d import causal_conv1d
from lightspine.ops.dispatch import runs_on_triton
from lightspine.ops.memory_format import channels_last
from lightspine.ops.selective_scan import scan

__all__ = ["Vim", "VimBlock", "VimLayerPair", "VimMixer", "checkpoint_filter_fn", "resize_pos_embed"]

CLASS_TOKENS = ("middle", "head", "double", "none")
FEATURE_SOURCES = ("residual", "mixer")
# Standard deviation of a standard normal distribution cut at -2 and 2.
_CUT_NORMAL_STD = 0.87962566103423978


def count_class_tokens(class_token: str) -> int:
    """Return the number of class tokens of a sequence."""
    return {"middle": 1, "head": 1, "double": 2, "none": 0}[class_token]


def patches_of(x: Tensor, class_token: str) -> Tensor:
    """Return the patch tokens (B, M, C) of a sequence (B, N, C)."""
    if class_token == "middle":
        middle = (x.shape[1] - 1) // 2
        return torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)
    if class_token == "head":
        return x[:, 1:]
    if class_token == "double":
        return x[:, 1:-1]
    return x


def class_tokens_of(x: Tensor, class_token: str) -> Tensor:
    """Return the class tokens (B, K, C) of a sequence (B, N, C)."""
    if class_token == "middle":
        middle = (x.shape[1] - 1) // 2
        return x[:, middle : middle + 1]
    if class_token == "head":
        return x[:, :1]
    if class_token == "double":
        return torch.cat((x[:, :1], x[:, -1:]), dim=1)
    return x[:, :0]


def join_tokens(patches: Tensor, tokens: Tensor, class_token: str) -> Tensor:
    """Insert K class tokens (B, K, C) into M patch tokens (B, M, C); returns (B, M + K, C).

    "middle" inserts before patch M // 2, "head" before the first, "double" before the first and after the
    last.
    """
    if class_token == "middle":
        middle = patches.shape[1] // 2
        return torch.cat((patches[:, :middle], tokens, patches[:, middle:]), dim=1)
    if class_token == "head":
        return torch.cat((tokens, patches), dim=1)
    if class_token == "double":
        return torch.cat((tokens[:, :1], patches, tokens[:, 1:]), dim=1)
    return patches


# torch.fx cannot trace its branch on the size, so it records the call.
@torch.fx.wrap
def resize_pos_embed(
    table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], class_token: str
) -> Tensor:
    """Resize a position table (1, M + K, C) to another grid of patches by bicubic interpolation.

    The rows of the class tokens are removed first and inserted at their position in the new sequence.

    The official fine-tuning script resizes the tables of middle-token models as if the class token were at
    the head, which shifts half of the map by one patch; `class_token="head"` reproduces that.

    Args:
        table: position table, one row per token of the sequence.
        grid: (rows, columns) of patches of the table.
        new_grid: (rows, columns) of patches of the result.
        class_token: "middle", "head", "double" or "none".
    """
    symbolic = False
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        # An export with dynamic sizes must not specialize on the size of its example.
        sides: tuple[object, object] = new_grid
        symbolic = isinstance(sides[0], torch.SymInt) or isinstance(sides[1], torch.SymInt)
    if not symbolic and grid[0] == new_grid[0] and grid[1] == new_grid[1]:
        return table
    patches = patches_of(table, class_token)
    field = patches.transpose(1, 2).reshape(1, -1, grid[0], grid[1])
    field = F.interpolate(field, size=(new_grid[0], new_grid[1]), mode="bicubic", align_corners=False)
    return join_tokens(field.flatten(2).transpose(1, 2), class_tokens_of(table, class_token), class_token)


def square_grid(rows: int, class_token: str) -> tuple[int, int]:
    """Return the square grid of patches of a position table with this number of rows.

    Raises:
        LightspineError: the patches do not form a square.
    """
    patches = rows - count_class_tokens(class_token)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise LightspineError(
            f"cannot resize a position table of {rows} rows: expected a square grid of patches and "
            f"{count_class_tokens(class_token)} class token(s), received {patches} patches; "
            f"build the model with the checkpoint's img_size=(height, width)"
        )
    return side, side


MIXER_DIRECTIONS = ("v2", "v1", "one-way")
DIRECTIONS = (*MIXER_DIRECTIONS, "layer-pairs")
LAYOUTS = ("NCHW", "NLC")


# torch.fx cannot trace a branch on the dtype, so it records the call.
@torch.fx.wrap
def at_least_float32(x: Tensor) -> Tensor:
    """Convert half-precision tensors to float32 and return others unchanged."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


class RMSNorm(nn.RMSNorm):
    """RMSNorm that computes in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        x = x.to(self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


class CausalConv1d(nn.Conv1d):
    """Depthwise `nn.Conv1d` with W - 1 positions of padding; the first L outputs are the causal ones.

    On a CPU it is much faster than `nn.Conv1d`: a 2d convolution of a channels-last image of height 1, which
    needs no transpose of tokens.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size - 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, L) to (B, D, L + W - 1)."""
        return convolve_depthwise(x, self.weight, self.bias)


def convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (B, D, L) with filters (D, 1, W) and W - 1 positions of padding; returns (B, D, L + W - 1)."""
    image = channels_last(x.unsqueeze(2))
    padding = (0, weight.shape[2] - 1)
    return F.conv2d(image, weight.unsqueeze(2), bias, padding=padding, groups=weight.shape[0]).squeeze(2)


class ScanDirection(nn.Module):
    """One direction of the mixer: causal depthwise convolution, SiLU, projections and selective scan.

    `reverse=True` scans from the last token to the first. It equals flipping the sequence before and after,
    without the copies: the convolution uses its mirrored kernel and the scan runs in reverse.

    Args:
        dim: number of channels D.
        state_dim: size of the state N of each channel.
        dt_rank: rank of the projection of dt.
        conv_kernel: kernel size of the convolution.
        reverse: scan from the last token to the first.
        recompute: activation checkpointing: save only the arguments of `forward` for the backward.
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
        self.conv1d = CausalConv1d(dim, conv_kernel)
        self.x_proj = nn.Linear(dim, dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(dt_rank, dim)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state_dim + 1).float()).repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.init_dt()

    def init_dt(self) -> None:
        """Initialize the projection of dt as published: forward, dt is log-uniform between 0.001 and 0.1.

        In the reverse direction dt starts at softplus(0) = 0.69, because the official code zeroes that bias.
        """
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        if self.reverse:
            nn.init.zeros_(self.dt_proj.bias)
        else:
            init_dt_bias(self.dt_proj.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Map tokens x (B, L, D) to arguments of the scan.

        Returns:
            u and delta, (B, D, L), B and C, (B, 1, N, L), and a bias that is still to be added to delta.
        """
        u = F.silu(self._convolve(x))
        projected = self.x_proj(u.transpose(1, 2))
        step, B, C = projected.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        delta, bias = self._project_dt(step)
        return u, delta.transpose(1, 2), B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1), bias

    def _convolve(self, x: Tensor) -> Tensor:
        """Map tokens (B, L, D) to (B, D, L)."""
        length = x.shape[1]
        x = x.transpose(1, 2)
        if not self.reverse:
            return self.conv1d(x)[:, :, :length]
        # TorchScript skips a branch only if its condition stands alone; do not join the two with `and`.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            pass
        elif is_plain(self.conv1d, CausalConv1d):
            # The mirrored filters need no copy of the tokens.
            weight = self.conv1d.weight
            reach = weight.shape[2] - 1
            return convolve_depthwise(x, weight.flip(2), self.conv1d.bias)[:, :, reach : reach + length]
        return self.conv1d(x.flip(2))[:, :, :length].flip(2)

    def _project_dt(self, step: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return delta (B, L, D), and the bias if the scan is to add it."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            pass
        elif is_plain(self.dt_proj, nn.Linear):
            # The scan adds the bias in float32.
            return F.linear(step, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(step), None

    def forward(self, x: Tensor, z: Tensor, A_log_back: Tensor | None = None) -> Tensor:
        """Scan tokens x and multiply by SiLU(z); all (B, L, D).

        Args:
            x: tokens.
            z: gate.
            A_log_back: add a scan of the same projections in the opposite direction, with this A.
        """
        if self.recompute and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint_scan(self._mix, x, z, A_log_back)
        return self._mix(x, z, A_log_back)

    def _mix(self, x: Tensor, z: Tensor, A_log_back: Tensor | None) -> Tensor:
        u, delta, B, C, bias = self.project(x)
        D, z, keep = self.D, z.transpose(1, 2), not self.recompute
        A = -torch.exp(at_least_float32(self.A_log))
        y = scan(u, delta, A, B, C, D, z, bias, True, self.reverse, save_states=keep)
        if A_log_back is not None:
            A_back = -torch.exp(at_least_float32(A_log_back))
            y = y + scan(u, delta, A_back, B, C, D, z, bias, True, not self.reverse, save_states=keep)
        return y.transpose(1, 2)


def mix_bidirectionally(
    x: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    """Run both directions of a mixer by one convolution and one scan, and add them.

    Args:
        x: tokens, (B, L, D).
        z: gate, (B, L, D).
        conv_weight: filters of both directions, (2, D, W).
        conv_bias: (2, D).
        project: maps the convolved tokens of both directions, (B, L, 2 D), to the inputs of dt, (B, L, 2 R),
            and to B and C of the scan, (B, 2, N, L).
        dt_weight: block-diagonal projection of both dt, (2 D, 2 R).
        A: state matrices, (2 D, N).
        D: skip connections, (2 D,).
        dt_bias: bias of dt, added in float32 by the scan, (2 D,).

    Returns:
        (B, L, D).
    """
    u = causal_conv1d(x.transpose(1, 2), conv_weight, conv_bias, silu=True, reverse=(False, True))
    low_rank, B, C = project(u.transpose(1, 2))
    delta = F.linear(low_rank, dt_weight).transpose(1, 2)
    return bidirectional_scan(u, delta, A, B, C, D, z.transpose(1, 2), dt_bias, True).transpose(1, 2)


class VimMixer(nn.Module):
    """Bidirectional selective-scan mixer (Vision Mamba, section 3.3).

    Takes and returns a map (B, C, H, W) of any size, as the sequence of its pixels in row-major order.

    >>> import torch
    >>> from lightspine.blocks import VimMixer
    >>> mixer = VimMixer(64)
    >>> mixer(torch.zeros(1, 64, 7, 5)).shape
    torch.Size([1, 64, 7, 5])

    Args:
        dim: number of channels C.
        state_dim: size of the state N of each inner channel.
        expand: inner channels per channel.
        conv_kernel: kernel size of the causal convolution.
        dt_rank: rank of the projection of dt; `None` is ceil(dim / 16).
        directions: "v2" scans forward and in reverse, each with its own convolution, projections, A and D;
            "v1" shares all but A; "one-way" scans forward only.
        divide_out: only for "v2": halve the sum of both directions, as in all released models; `None` is
            `True` there.
        layer_scale: initial value of a learned scale per output channel; `None` for no scale.
        reverse: only for "one-way": scan from the last pixel to the first.
        recompute: activation checkpointing, as in the paper: only the input and gate of a direction are saved
            for the backward. `False` is a little faster, but a `VimBlock` of 192 channels then saves some
            20,100 instead of 6,916 bytes per token (float32).
        layout: "NCHW" for maps, or "NLC" for tokens (B, L, C).

    Raises:
        UsageError: an unknown choice, or an option that does not apply to `directions`.
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
        check_choice("directions", directions, MIXER_DIRECTIONS)
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
        """Mix tokens (B, L, C)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if self.A_log_back is not None:
            y = self.ahead(x, z, self.A_log_back)
        else:
            y = self._scan_directions(x, z)
            if self.divide_out:
                y = y / 2
        y = self.out_proj(y)
        return y if self.gamma is None else y * self.gamma

    def _scan_directions(self, x: Tensor, z: Tensor) -> Tensor:
        # TorchScript skips a branch only if its condition stands alone; do not join the two with `and`.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            pass
        elif self.back is not None and self._scans_both_at_once(x):
            return checkpoint_scan(self._mix_both, x, z) if self.recompute else self._mix_both(x, z)
        y = self.ahead(x, z)
        return y if self.back is None else y + self.back(x, z)

    @torch.jit.unused
    def _scans_both_at_once(self, x: Tensor) -> bool:
        return runs_on_triton(x) and all(
            is_plain(direction, ScanDirection)
            and is_plain(direction.conv1d, CausalConv1d)
            and is_plain(direction.dt_proj, nn.Linear)
            for direction in (self.ahead, self.back)
            if direction is not None
        )

    @torch.jit.unused
    def _mix_both(self, x: Tensor, z: Tensor) -> Tensor:
        assert self.back is not None
        directions: Any = (self.ahead, self.back)
        return mix_bidirectionally(
            x,
            z,
            torch.cat([d.conv1d.weight.transpose(0, 1) for d in directions]),
            torch.stack([d.conv1d.bias for d in directions]),
            self._project_both,
            torch.block_diag(*(d.dt_proj.weight for d in directions)),
            -torch.exp(at_least_float32(torch.cat([d.A_log for d in directions]))),
            torch.cat([d.D for d in directions]),
            torch.cat([d.dt_proj.bias for d in directions]),
        )

    @torch.jit.unused
    def _project_both(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        directions: Any = (self.ahead, self.back)
        split = [
            d.x_proj(half).split([d.dt_rank, d.state_dim, d.state_dim], dim=-1)
            for d, half in zip(directions, u.chunk(2, dim=-1), strict=True)
        ]
        low_rank, *B_and_C = zip(*split, strict=True)
        B, C = (torch.stack(pair, dim=2).permute(0, 2, 3, 1) for pair in B_and_C)
        return torch.cat(low_rank, dim=-1), B, C

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W), or tokens (B, L, C) with `layout="NLC"`."""
        if self.layout == "NLC":
            return self.forward_tokens(x)
        return self.forward_tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class VimBlock(nn.Module):
    """Vim block (Vision Mamba, algorithm 1): norm, bidirectional mixer, residual connection.

    Takes and returns a map (B, C, H, W) of any size. The input is the residual stream, which should be
    float32; norm and mixer compute in the dtype of the weights.

    >>> import torch
    >>> from lightspine.blocks import VimBlock
    >>> block = VimBlock(64)
    >>> block(torch.zeros(1, 64, 7, 5)).shape
    torch.Size([1, 64, 7, 5])

    Args:
        dim: number of channels C.
        state_dim: see `VimMixer`, as for all arguments up to `recompute`.
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
        layout: "NCHW" for maps, or "NLC" for tokens (B, L, C).

    Raises:
        UsageError: an unknown choice, or an option that does not apply to `directions`.
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
        return x + self.drop_path(self.mixer(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Run on a map (B, C, H, W), or on tokens (B, L, C) with `layout="NLC"`."""
        if self.layout == "NLC":
            return self.forward_tokens(x)
        return self.forward_tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class VimLayerPair(nn.Module):
    """Sum of a forward and a reverse one-way block on the same input.

    The paper's "bidirectional layer" (ablation of section 4). Each block adds its input to its output, so
    the residual stream doubles with each pair, as published.

    Args:
        dim: number of channels C.
        state_dim: see `VimMixer`, as for all arguments up to `recompute`.
        expand: see `VimMixer`.
        conv_kernel: see `VimMixer`.
        dt_rank: see `VimMixer`.
        layer_scale: see `VimMixer`.
        recompute: see `VimMixer`.
        norm: "rms" or "layer".
        drop_path: drop-path probabilities of the (forward, reverse) block.
        layout: "NCHW" for maps, or "NLC" for tokens (B, L, C).
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
        """Run on a map (B, C, H, W), or on tokens (B, L, C) with `layout="NLC"`."""
        return self.ahead(x) + self.back(x)


class Vim(nn.Module):
    """Vision Mamba backbone and classifier.

    Takes images of any height and width of at least `patch_size`. As published, pixels at the right and
    bottom that do not fill a patch are ignored; `dynamic_img_pad=True` pads the image with zeros instead.

    Args:
        in_chans: number of input channels.
        num_classes: number of classes; 0 for no classifier.
        global_pool: with class tokens "token" (their mean); without "avg" (mean over tokens), "max" (maximum
            over the logits of all tokens) or "last" (last token); "" for no pooling. `None` is "token" or
            "avg".
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 at the first one.
        pos_drop_rate: dropout after the position table is added.
        img_size: image size, or (height, width), of the position table.
        patch_size: side of a patch in pixels.
        stride: distance between patches in pixels.
        stem_stride: alias of `stride`, the name in all families. Weights keep their shapes, except for the
            position table, which is resized on loading, so published ones load. For images of 32 px use 4
            (5 x 5 overlapping patches; 8 x 8 with `patch_size=4`, which needs a new stem), for 64 px 8.
        dim: number of channels C.
        depth: number of layers.
        state_dim: see `VimMixer`, as `expand`, `conv_kernel`, `dt_rank` and `divide_out`.
        expand: see `VimMixer`.
        conv_kernel: see `VimMixer`.
        dt_rank: see `VimMixer`.
        directions: "v2", "v1" or "one-way" as in `VimMixer`, or "layer-pairs" (`VimLayerPair`), an ablation
            whose residual stream grows exponentially with depth.
        divide_out: see `VimMixer`.
        layer_scale: see `VimMixer`.
        recompute: see `VimMixer`.
        norm: "rms" or "layer".
        class_token: "middle" (before patch M // 2 of M), "head", "double" (head and tail) or "none".
        pos_embed: use a learned position table, one row per token.
        pos_embed_resize: how a checkpoint's table is resized to the model's grid: "aligned", or "official" as
            in the official fine-tuning script, which shifts half of the map (`resize_pos_embed`). The
            published stride-8 models and segmenters were fine-tuned from the latter.
        dynamic_img_pad: pad images at the right and bottom to whole patches.
        feature_source: what feature maps are: "residual", the output of a block, or "mixer", what the block
            adds to its input, as in the published segmenters.

    Raises:
        UsageError: an unknown choice, or incompatible options.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        stem_stride: int | None = None,
        dim: int = 192,
        depth: int = 24,
        state_dim: int = 16,
        expand: int = 2,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        directions: str = "v2",
        divide_out: bool | None = None,
        layer_scale: float | None = None,
        recompute: bool = True,
        norm: str = "rms",
        class_token: str = "middle",
        pos_embed: bool = True,
        pos_embed_resize: str = "aligned",
        dynamic_img_pad: bool = False,
        feature_source: str = "residual",
    ) -> None:
        super().__init__()
        check_choice("directions", directions, DIRECTIONS)
        check_choice("feature_source", feature_source, FEATURE_SOURCES)
        check_choice("norm", norm, tuple(NORMS))
        check_choice("class_token", class_token, CLASS_TOKENS)
        check_choice("pos_embed_resize", pos_embed_resize, ("aligned", "official"))
        if pos_embed_resize == "official" and not (pos_embed and class_token != "double"):
            raise UsageError(
                "pos_embed_resize 'official' needs a position table with at most one class token: "
                f"received pos_embed={pos_embed} and class_token {class_token!r}"
            )
        stride = _choose_stride(stride, stem_stride)
        if directions == "layer-pairs" and feature_source == "mixer":
            raise UsageError("feature_source 'mixer' needs one mixer per block: received 'layer-pairs'")
        if directions == "layer-pairs" and depth % 2:
            raise UsageError(f"directions 'layer-pairs' needs an even depth: received {depth}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim
        self.class_token = class_token
        self.pos_embed_resize = pos_embed_resize
        self.directions = directions
        self.patch_size, self.stride = patch_size, stride
        self.dynamic_img_pad = dynamic_img_pad
        self.feature_source = feature_source
        self.grad_checkpointing = False
        self.global_pool = self._checked_pool(global_pool)

        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(size) < patch_size:
            raise UsageError(
                f"img_size must be at least patch_size {patch_size}: received {size[0]} x {size[1]}"
            )
        self.grid_size = self._grid(size[0]), self._grid(size[1])
        class_tokens = count_class_tokens(class_token)
        self.stem = nn.Conv2d(in_chans, dim, patch_size, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, dim)) if class_tokens else None
        tokens = self.grid_size[0] * self.grid_size[1] + class_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        mixing: dict[str, Any] = {
            "state_dim": state_dim,
            "expand": expand,
            "conv_kernel": conv_kernel,
            "dt_rank": dt_rank,
            "layer_scale": layer_scale,
            "recompute": recompute,
        }
        if directions == "layer-pairs":
            if divide_out is not None:
                raise UsageError("divide_out belongs to directions 'v2': received it with 'layer-pairs'")
            pairs = zip(rates[::2], rates[1::2], strict=True)
            blocks: list[nn.Module] = [
                VimLayerPair(dim, **mixing, norm=norm, drop_path=pair, layout="NLC") for pair in pairs
            ]
        else:
            mixing |= {"directions": directions, "divide_out": divide_out}
            blocks = [VimBlock(dim, **mixing, norm=norm, drop_path=rate, layout="NLC") for rate in rates]
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"blocks.{i}"} for i in range(len(blocks))
        ]
        self.norm: nn.Module = NORMS[norm](dim, eps=1e-5)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._init_weights(depth)

    @torch.jit.ignore
    def _init_weights(self, depth: int) -> None:
        _init_stem(self.stem.weight)
        nn.init.zeros_(self.stem.bias)  # type: ignore[arg-type]
        for table in (self.cls_token, self.pos_embed):
            if table is not None:
                trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, VimMixer):
                with torch.no_grad():
                    module.out_proj.weight.div_(math.sqrt(depth))
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _checked_pool(self, global_pool: str | None) -> str:
        choices = ("avg", "max", "last", "") if self.class_token == "none" else ("token", "")
        pool = choices[0] if global_pool is None else global_pool
        check_choice(f"global_pool for class_token {self.class_token!r}", pool, choices)
        return pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the class token and position table; A_log is 2-d and is decayed, as published."""
        return {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 (there are no stages)
        """Return timm's parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^stem",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing of the blocks."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one, and optionally the pooling.

        Raises:
            UsageError: a pooling that does not apply to the class token.
        """
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.to(next(self.parameters())).train(self.training)
        self._init_head()

    def _grid(self, size: int) -> int:
        """Return the number of patches along a side of `size` pixels."""
        if self.dynamic_img_pad:
            size = size + self.stride - 1
        return (size - self.patch_size) // self.stride + 1

    def _embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Return the input (B, N, C) of the first block and the grid of patches."""
        check_images(x)
        if self.dynamic_img_pad:
            right = (self.patch_size - x.shape[3]) % self.stride
            bottom = (self.patch_size - x.shape[2]) % self.stride
            x = F.pad(x, (0, right, 0, bottom))
        x = at_least_float32(self.stem(x))
        height, width = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = join_tokens(x, self.cls_token.expand(x.shape[0], -1, -1), self.class_token)
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, self.grid_size, (height, width), self.class_token)
        return self.pos_drop(x), height, width

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to normalized tokens (B, N, C), including the class tokens."""
        x = self._embed(x)[0]
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = checkpoint_module(block, x)
            else:
                x = block(x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return feature maps after selected blocks, without the class tokens.

        Args:
            x: images (B, in_chans, H, W).
            indices: number of last blocks, list of block indices, or `None` for all.
            norm: apply the final norm to each map.
            stop_early: stop after the last selected block.
            output_fmt: "NCHW" for maps, "NLC" for patch tokens (B, M, C).
            intermediates_only: return only the list of maps.

        Returns:
            The maps, or a pair of the normalized tokens (B, N, C) of the last computed block and the maps.

        Raises:
            UsageError: an unknown `output_fmt`.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, height, width = self._embed(x)
        maps = []
        blocks: Iterable[Any] = self.blocks
        for i, block in enumerate(blocks):
            if stop_early and i > last:
                break
            if self.feature_source == "mixer":
                assert isinstance(block, VimBlock)  # "layer-pairs" is refused
                normed = block.norm(x)
                found = (
                    checkpoint_module(block.mixer, normed) if self.grad_checkpointing else block.mixer(normed)
                )
                # Drop path applies to what the next block receives, not to the map.
                x = x + block.drop_path(found)
            else:
                found = x = checkpoint_module(block, x) if self.grad_checkpointing else block(x)
            if i in taken:
                tokens = patches_of(self.norm(found) if norm else found, self.class_token)
                if output_fmt == "NCHW":
                    tokens = tokens.transpose(1, 2).unflatten(2, (height, width))
                maps.append(tokens)
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks, norm and head that the given intermediates do not need; return their indices."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(taken)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (B, N, C) to logits (B, num_classes), or (B, N, num_classes) without pooling.

        With `pre_logits` it returns the input of the classifier: (B, C), or all tokens for "max" and "".
        """
        if self.global_pool == "token":
            x = class_tokens_of(x, self.class_token).mean(1)
        elif self.global_pool == "avg":
            x = x.mean(1)
        elif self.global_pool == "last":
            x = x[:, -1]
        x = self.head_drop(x)
        if pre_logits:
            return x
        x = self.head(x)
        return x.amax(1) if self.global_pool == "max" else x

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits."""
        return self.forward_head(self.forward_features(x))


def _init_stem(weight: Tensor) -> None:
    """Initialize the patch embedding as timm 0.4.12, with which the published models were trained.

    Its `lecun_normal_` divides the standard deviation by that of a normal distribution cut at two standard
    deviations, but cuts at -2 and 2. The result is 0.0410 for 768 inputs; later versions of timm give 0.0361.
    """
    fan_in = weight[0].numel()
    trunc_normal_(weight, std=fan_in**-0.5 / _CUT_NORMAL_STD, a=-2.0, b=2.0)


def _choose_stride(stride: int | None, stem_stride: int | None) -> int:
    if stride is not None and stem_stride is not None:
        raise UsageError(f"stride and stem_stride are the same: received both, {stride} and {stem_stride}")
    chosen = stem_stride if stride is None else stride
    if chosen is not None and chosen < 1:
        raise UsageError(f"the stride of the patches must be at least 1: received {chosen}")
    return 16 if chosen is None else chosen


def _cfg(**overrides: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/hustvl/Vim",
        "paper_ids": "arXiv:2401.09417",
        **overrides,
    }


# Each repository has the files of the models of one size.
default_cfgs = generate_default_cfgs(
    {
        f"vim_{model}.in1k": _cfg(hf_hub_id=f"hustvl/Vim-{size}-midclstok")
        for size, models in {
            "tiny": ("tiny", "tiny_plus"),
            "small": ("small", "small_plus"),
            "base": ("base",),
        }.items()
        for model in models
    }
)

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^patch_embed\.proj\.", "stem."),
        (r"^norm_f\.", "norm."),
        (r"^layers\.(\d+)\.mixer\.(conv1d|x_proj|dt_proj)\.", r"layers.\1.mixer.ahead.\2."),
        (r"^layers\.(\d+)\.mixer\.(conv1d|x_proj|dt_proj)_b\.", r"layers.\1.mixer.back.\2."),
        (r"^layers\.(\d+)\.mixer\.(A_log|D)$", r"layers.\1.mixer.ahead.\2"),
        (r"^layers\.(\d+)\.mixer\.D_b$", r"layers.\1.mixer.back.D"),
        (r"^layers\.", "blocks."),
    )
)


def _rename(key: str, shared_directions: bool, layer_pairs: bool) -> str:
    """Convert an official key; keys of this module stay unchanged."""
    published_layer = re.match(r"layers\.(\d+)\.", key)
    key = re.sub(
        r"^(layers\.\d+\.mixer)\.A_b_log$", r"\1.A_log_back" if shared_directions else r"\1.back.A_log", key
    )
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    if layer_pairs and published_layer:
        pair, second = divmod(int(published_layer[1]), 2)
        key = re.sub(r"^blocks\.\d+", f"blocks.{pair}.{'back' if second else 'ahead'}", key)
    return key


def checkpoint_filter_fn(state_dict: StateDict, model: Vim) -> StateDict:
    """Convert an official or lightspine state dict to the names of this module; resize the position table.

    Raises:
        LightspineError: the position table must be resized but does not belong to a square image.
    """
    # Only "v2" has its own D for the reverse direction; in "v1" only A is separate.
    shared_directions = not any(key.endswith(".D_b") for key in state_dict)
    layer_pairs = model.directions == "layer-pairs"
    out = {_rename(key, shared_directions, layer_pairs): value for key, value in state_dict.items()}
    if "cls_token_head" in out and "cls_token_tail" in out:
        out["cls_token"] = torch.cat((out.pop("cls_token_head"), out.pop("cls_token_tail")), dim=1)
    if model.class_token == "none":
        _remove_class_tokens(out, model)
    table = out.get("pos_embed")
    same_tokens = ("cls_token" in out) == (model.class_token != "none")
    if (
        table is not None
        and model.pos_embed is not None
        and table.ndim == 3
        and table.shape[1] != model.pos_embed.shape[1]
        and same_tokens
    ):
        grid = square_grid(table.shape[1], model.class_token)
        official = model.pos_embed_resize == "official" and model.class_token != "none"
        token = "head" if official else model.class_token
        out["pos_embed"] = resize_pos_embed(table, grid, model.grid_size, token)
    return out


def _remove_class_tokens(state_dict: StateDict, model: Vim) -> None:
    """Remove the class tokens and their rows of the position table, in place, as in the published segmenters.

    With `pos_embed_resize="official"` the first row is removed, although the token is in the middle.
    """
    tokens, table = state_dict.pop("cls_token", None), state_dict.get("pos_embed")
    if table is None or model.pos_embed is None:
        return
    # A table for a square of patches and one more row has a class token, even if the token itself is missing.
    rows = table.shape[1] - 1
    count = int(math.isqrt(rows) ** 2 == rows) if tokens is None else tokens.shape[1]
    single = "head" if model.pos_embed_resize == "official" else "middle"
    state_dict["pos_embed"] = patches_of(table, ("none", single, "double")[count])


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    if "stem_stride" in options:
        sizes.pop("stride", None)  # replaces the stride of the variant
    settings = sizes | options
    blocks = settings.get("depth", 24) // (2 if settings.get("directions") == "layer-pairs" else 1)
    quarters = tuple(blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    return build_model(Vim, variant, pretrained, default_indices=quarters, **settings)


_SOURCE = "README of hustvl/Vim"
_FINE_TUNED = "fine-tuned at stride 8 for 30 epochs from the stride-16 weights"


@register_model(params=7_148_008, published=Published(top1=76.1, source=_SOURCE))
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti: 192 channels, patches of 16 pixels."""
    return _create("vim_tiny", pretrained, {"dim": 192}, kwargs)


@register_model(params=7_250_344, published=Published(top1=78.3, note=_FINE_TUNED, source=_SOURCE))
def vim_tiny_plus(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti+: as Vim-Ti, with patches that overlap by half."""
    return _create("vim_tiny_plus", pretrained, {"dim": 192, "stride": 8}, kwargs)


@register_model(params=25_796_584, published=Published(top1=80.5, source=_SOURCE))
def vim_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S: 384 channels, patches of 16 pixels."""
    return _create("vim_small", pretrained, {"dim": 384}, kwargs)


@register_model(params=26_001_256, published=Published(top1=81.6, note=_FINE_TUNED, source=_SOURCE))
def vim_small_plus(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S+: as Vim-S, with patches that overlap by half."""
    return _create("vim_small_plus", pretrained, {"dim": 384, "stride": 8}, kwargs)


@register_model(params=97_598_440, published=Published(top1=81.9, source=_SOURCE))
def vim_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B: 768 channels, patches of 16 pixels."""
    return _create("vim_base", pretrained, {"dim": 768}, kwargs)
