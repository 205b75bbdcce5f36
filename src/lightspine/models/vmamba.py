"""VMamba: visual state space backbones built on the 2D selective scan (SS2D).

Paper: "VMamba: Visual State Space Model", Liu et al., NeurIPS 2024, arXiv:2401.10166.
Official code: https://github.com/MzeroMiko/VMamba (MIT).

Differences from the official code: constructor options instead of strings such as "v05_noz"
(`options_from_official` translates them); one memory layout instead of two; a stage begins with its
downsampling, so that its output is its feature map; patch merging pads odd maps in both directions; the
cascaded scan of one ablation is not supported.

Blocks take and return maps `(B, C, H, W)` and compute in `torch.channels_last` format, in which linear
layers, layer norms and the depthwise convolution need no copy.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, Mlp, SelectAdaptivePool2d, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.layers.arguments import check_choice, check_global_pool, check_images, stem_strides
from lightspine.layers.blocks import Stage, init_dt_bias
from lightspine.layers.checkpointing import checkpoint_scan
from lightspine.models.registry import Published, StateDict, build_model, register_model
from lightspine.ops.cross_scan import cross_scan, fuses_projection, projected_cross_scan
from lightspine.ops.memory_format import channels_last
from lightspine.ops.scan_orders import scan_order as pixel_order

__all__ = ["SS2D", "VMamba", "VSSBlock", "options_from_official"]

EPS = 1e-5
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}
GATES = ("silu", "linear", "none")
OUT_NORMS = ("layer", "none", "dwconv", "layer_dwconv", "softmax", "sigmoid")
SSM_INITS = ("v0", "v1", "v2")


def make_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer with the published initialization: normal with deviation 0.02, bias 0."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    # Truncated at +-2, which is a hundred deviations: in effect a normal distribution.
    trunc_normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def make_depthwise_conv(dim: int, kernel_size: int, bias: bool) -> nn.Conv2d:
    """Return a depthwise convolution with padding that keeps the size of a (B, C, H, W) map."""
    return nn.Conv2d(dim, dim, kernel_size, padding=(kernel_size - 1) // 2, groups=dim, bias=bias)


class NormAndConv(nn.Sequential):
    """LayerNorm and depthwise 3x3 convolution of a (B, H, W, C) map."""

    def __init__(self, dim: int):
        super().__init__(nn.LayerNorm(dim, eps=EPS), make_depthwise_conv(dim, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return self[1](self[0](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SpatialSoftmax(nn.Module):
    """Softmax of every channel over the pixels of a (B, H, W, C) map."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


def _make_out_norm(kind: str, dim: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(dim, eps=EPS)
    if kind == "dwconv":
        return make_depthwise_conv(dim, 3, bias=False)
    if kind == "layer_dwconv":
        return NormAndConv(dim)
    if kind == "softmax":
        return SpatialSoftmax()
    return nn.Sigmoid() if kind == "sigmoid" else nn.Identity()


class SS2D(nn.Module):
    """2D selective scan: a selective state space model that scans the map in several directions.

    Source: VMamba (arXiv:2401.10166), section 4.2; for the options, its acceleration and ablation studies.

    Args:
        dim: channels of the map.
        state_dim: size N of the state of each channel.
        ssm_ratio: width of the scanned map, as a multiple of `dim`.
        dt_rank: rank of the projection of dt; "auto" is `dim / 16`, rounded up.
        act: activation before the scan: silu, gelu, relu or sigmoid.
        conv_size: odd kernel size of the depthwise convolution before the scan; 0 for none.
        conv_bias: use a bias in that convolution.
        gate: "silu" multiplies the output by SiLU of a second projection of the input (as in Mamba), "linear"
            by the projection itself; "none" has no gate.
        out_norm: layer after the scan: "layer" (LayerNorm), "none", "dwconv" (depthwise 3x3 convolution),
            "layer_dwconv" (both in this order), "softmax" over the pixels, or "sigmoid".
        out_act: apply GELU after `out_norm`.
        scan_order: registered order of `lightspine.ops.cross_scan`: cross2d, unidirectional, bidirectional.
        init: initialization of the state space model: "v0" as in Mamba, "v1" normal, "v2" uniform dt.
        drop_rate: dropout of the output.
        recompute: activation checkpointing of everything between `in_proj` and the scan. Off by default, as
            in the paper.

    Shape:
        `(B, dim, H, W)` of any H and W to `(B, dim, H, W)`.

    Raises:
        UsageError: an option has an unknown value. VMamba's "cascade2d" order, which scans the output of the
            row scans along the columns, is not supported.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import SS2D
        >>> SS2D(32, state_dim=4)(torch.zeros(1, 32, 5, 7)).shape
        torch.Size([1, 32, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        act: str = "silu",
        conv_size: int = 3,
        conv_bias: bool = False,
        gate: str = "none",
        out_norm: str = "layer",
        out_act: bool = False,
        scan_order: str = "cross2d",
        init: str = "v0",
        drop_rate: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        check_choice("act", act, tuple(ACTIVATIONS))
        check_choice("gate", gate, GATES)
        check_choice("out_norm", out_norm, OUT_NORMS)
        check_choice("init", init, SSM_INITS)
        if conv_size and (conv_size < 3 or conv_size % 2 == 0):
            raise UsageError(f"conv_size must be 0 or an odd number from 3 up, got {conv_size}")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise UsageError(f"dt_rank must be a number or 'auto', got {dt_rank!r}")
        if scan_order == "cascade2d":
            raise UsageError("the scan order 'cascade2d' is not supported: expected one pass over the map")
        self.gate = gate
        self.recompute = recompute
        self.scan_order = scan_order
        self.directions = len(pixel_order(scan_order, 1, 1))
        self.dt_rank = math.ceil(dim / 16) if isinstance(dt_rank, str) else dt_rank
        self.state_dim = state_dim
        inner = int(ssm_ratio * dim)
        rows = self.dt_rank + 2 * state_dim

        self.in_proj = make_linear(dim, inner, bias=False)
        self.gate_proj = nn.Identity() if gate == "none" else make_linear(dim, inner, bias=False)
        self.gate_act = nn.SiLU() if gate == "silu" else nn.Identity()
        self.conv = make_depthwise_conv(inner, conv_size, conv_bias) if conv_size else nn.Identity()
        self.act = ACTIVATIONS[act]()
        # Output channels of each direction: dt_rank of dt, state_dim of B, state_dim of C. As published, it
        # keeps PyTorch's default initialization.
        self.x_proj = nn.Linear(inner, self.directions * rows, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(self.directions, inner, self.dt_rank))
        # 2-d, so that weight decay applies to it, as published; D is 1-d and is not decayed.
        self.dt_bias = nn.Parameter(torch.empty(self.directions, inner))
        self.A_log = nn.Parameter(torch.empty(self.directions, inner, state_dim))
        self.D = nn.Parameter(torch.empty(self.directions * inner))
        self.out_norm = _make_out_norm(out_norm, inner)
        self.out_norm_takes_nchw = out_norm == "dwconv"
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = make_linear(inner, dim, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self._init_ssm(init)

    @torch.no_grad()
    def _init_ssm(self, init: str) -> None:
        nn.init.ones_(self.D)
        if init == "v0":
            nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            init_dt_bias(self.dt_bias)
            self.A_log.copy_(torch.arange(1.0, self.state_dim + 1).log().expand_as(self.A_log))
        elif init == "v1":
            self.dt_weight.normal_(std=0.1)
            self.dt_bias.normal_(std=0.1)
            self.A_log.normal_()
        else:
            self.dt_weight.uniform_(0, 0.1)
            self.dt_bias.uniform_(0, 0.1)
            self.A_log.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)  # B H W C
        inner = self.in_proj(x)  # B H W D
        if self.recompute and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = checkpoint_scan(self._scan, inner)
        else:
            y = self._scan(inner)
        if self.out_norm_takes_nchw:
            y = self.out_norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            y = self.out_norm(y)
        y = self.out_act(y)
        if self.gate != "none":
            y = y * self.gate_act(self.gate_proj(x))
        return self.drop(self.out_proj(y)).permute(0, 3, 1, 2)

    def _scan(self, x: Tensor) -> Tensor:
        """Convolve and activate a (B, H, W, D) map, scan it in all directions and sum the outputs."""
        u = self.act(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        batch, height, width, _ = u.shape
        # The projections are pointwise: one product in pixel order computes those of every direction.
        rows = self.dt_rank + 2 * self.state_dim
        projected = self.x_proj(u).view(batch, height, width, self.directions, rows)
        # At least float32, because exp(delta * A) amplifies the rounding of A.
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        D = self.D.view(self.directions, -1)
        keep = not self.recompute
        # TorchScript skips a branch only if its condition stands alone.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            pass
        elif fuses_projection(u, self.state_dim):
            weight = self.dt_weight.transpose(1, 2)
            y = projected_cross_scan(
                u, projected, weight, A, D, self.dt_bias, self.scan_order, save_states=keep
            )
            return y.to(self.dt_weight.dtype)
        dt, B, C = projected.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        delta = torch.einsum("bhwkr,kdr->bhwkd", dt, self.dt_weight)
        y = cross_scan(u, delta, A, B, C, D, self.dt_bias, True, self.scan_order, save_states=keep)
        # The sum is float32 under autocast; a model cast to half precision gets its own precision back.
        return y.to(self.dt_weight.dtype)


class VSSBlock(nn.Module):
    """Visual state space block: SS2D and an MLP, each with a layer norm before and a residual connection.

    Source: VMamba (arXiv:2401.10166), section 4.3.

    Args:
        dim: channels of the map.
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`; 0 for a block without MLP.
        mlp_act: activation of the MLP: gelu, silu, relu or sigmoid.
        mlp_drop_rate: dropout in the MLP.
        drop_path: probability of dropping a branch, per sample, in training.
        state_dim: see `SS2D`, as for all following arguments.
        ssm_ratio: see `SS2D`.
        dt_rank: see `SS2D`.
        ssm_act: `act` of `SS2D`.
        ssm_conv_size: `conv_size` of `SS2D`.
        ssm_conv_bias: `conv_bias` of `SS2D`.
        ssm_init: `init` of `SS2D`.
        ssm_drop_rate: `drop_rate` of `SS2D`.
        ssm_recompute: `recompute` of `SS2D`.
        gate: see `SS2D`.
        out_norm: see `SS2D`.
        out_act: see `SS2D`.
        scan_order: see `SS2D`.

    Shape:
        `(B, dim, H, W)` of any H and W to `(B, dim, H, W)`.

    Raises:
        UsageError: an option has an unknown value.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import VSSBlock
        >>> VSSBlock(32, mlp_ratio=2.0)(torch.zeros(1, 32, 5, 7)).shape
        torch.Size([1, 32, 5, 7])
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        mlp_drop_rate: float = 0.0,
        drop_path: float = 0.0,
        state_dim: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | str = "auto",
        ssm_act: str = "silu",
        ssm_conv_size: int = 3,
        ssm_conv_bias: bool = False,
        ssm_init: str = "v0",
        ssm_drop_rate: float = 0.0,
        ssm_recompute: bool = False,
        gate: str = "none",
        out_norm: str = "layer",
        out_act: bool = False,
        scan_order: str = "cross2d",
    ):
        super().__init__()
        check_choice("mlp_act", mlp_act, tuple(ACTIVATIONS))
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.ssm = SS2D(
            dim,
            state_dim=state_dim,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            act=ssm_act,
            conv_size=ssm_conv_size,
            conv_bias=ssm_conv_bias,
            gate=gate,
            out_norm=out_norm,
            out_act=out_act,
            scan_order=scan_order,
            init=ssm_init,
            drop_rate=ssm_drop_rate,
            recompute=ssm_recompute,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.has_mlp = mlp_ratio > 0
        self.norm2: nn.Module = nn.Identity()
        self.mlp: nn.Module = nn.Identity()
        if self.has_mlp:
            hidden = int(dim * mlp_ratio)
            self.norm2 = nn.LayerNorm(dim, eps=EPS)
            self.mlp = Mlp(dim, hidden, act_layer=ACTIVATIONS[mlp_act], drop=mlp_drop_rate)
            self.mlp.fc1, self.mlp.fc2 = make_linear(dim, hidden), make_linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        normed = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.ssm(normed))
        if self.has_mlp:
            x = x.permute(0, 2, 3, 1)
            x = (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)
        return x


def make_stem(version: str, in_chans: int, dim: int, norm: bool, stride: int = 4) -> nn.Module:
    """Return the stem.

    Args:
        version: "v1" is one 4x4 convolution, "v2" two 3x3 convolutions of stride 2.
        in_chans: channels of the image.
        dim: channels of the map; even for "v2".
        norm: add layer norms after the convolutions.
        stride: 4 as published; with "v2" also 2 or 1, for which the first or both convolutions have stride 1.

    Returns:
        Module that maps (B, in_chans, H, W) to (B, dim, H / stride, W / stride). As published, "v1" ignores
        up to three pixels at the right and bottom of a size that is not a multiple of 4; "v2" rounds up.

    Raises:
        UsageError: an unknown version, an odd `dim` for "v2", or an unsupported stride.
    """
    check_choice("stem", version, ("v1", "v2"))
    if version == "v1":
        if stride != 4:
            raise UsageError(f"the stem 'v1' has stem_stride=4 only, got {stride}: use stem='v2'")
        parts = [("conv1", nn.Conv2d(in_chans, dim, 4, 4)), ("norm1", LayerNorm2d(dim, eps=EPS))]
    else:
        if dim % 2:
            raise UsageError(f"the stem 'v2' needs an even number of channels, got {dim}")
        first, second = stem_strides(stride, 2)
        parts = [
            ("conv1", nn.Conv2d(in_chans, dim // 2, 3, first, 1)),
            ("norm1", LayerNorm2d(dim // 2, eps=EPS)),
            ("act", nn.GELU()),
            ("conv2", nn.Conv2d(dim // 2, dim, 3, second, 1)),
            ("norm2", LayerNorm2d(dim, eps=EPS)),
        ]
    return nn.Sequential(OrderedDict(part for part in parts if norm or "norm" not in part[0]))


class PatchMerging(nn.Module):
    """Downsampling "v1": concatenation of 2x2 pixels, layer norm, linear layer.

    Odd maps are padded at the right and bottom.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)
        self.reduction = make_linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_dim, H / 2, W / 2), rounded up."""
        x = x.permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim)
        # Among the four pixels, the row index varies fastest.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


def make_downsample(version: str, dim: int, out_dim: int) -> nn.Module:
    """Return a downsampling layer, (B, dim, H, W) to (B, out_dim, H / 2, W / 2), rounded up except for "v2".

    Args:
        version: "v1" is `PatchMerging`, "v2" a 2x2 and "v3" a 3x3 convolution of stride 2 with a layer norm.
        dim: input channels.
        out_dim: output channels.

    Raises:
        UsageError: an unknown version.
    """
    check_choice("downsample", version, ("v1", "v2", "v3"))
    if version == "v1":
        return PatchMerging(dim, out_dim)
    conv = nn.Conv2d(dim, out_dim, 2, 2) if version == "v2" else nn.Conv2d(dim, out_dim, 3, 2, 1)
    return nn.Sequential(OrderedDict([("conv", conv), ("norm", LayerNorm2d(out_dim, eps=EPS))]))


# torch.fx cannot trace its branch on the size, so it records the call.
@torch.fx.wrap
def resize_pos_embed(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Resize a position table (1, C, H, W) by bicubic interpolation, as in the official loader."""
    if pos_embed.shape[2] == height and pos_embed.shape[3] == width:
        return pos_embed
    resized = F.interpolate(pos_embed.float(), size=[height, width], mode="bicubic", align_corners=False)
    return resized.to(pos_embed.dtype)


class VMamba(nn.Module):
    """VMamba backbone and classifier.

    Args:
        in_chans: channels of the image.
        num_classes: number of classes; 0 for no classifier.
        global_pool: "avg", or "" for no pooling (with `num_classes=0` only).
        img_size: image size of the position table; no effect without `pos_embed`.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        state_dim: size of the state of each scanned channel.
        ssm_ratio: width of the scanned map, as a multiple of the stage's channels.
        dt_rank: rank of the projection of dt; "auto" is a 16th of the stage's channels, rounded up.
        ssm_act: activation before the scan: silu, gelu, relu or sigmoid.
        ssm_conv_size: kernel size of the depthwise convolution before the scan; 0 for none.
        ssm_conv_bias: use a bias in that convolution.
        ssm_init: initialization of the state space model, "v0", "v1" or "v2" (see `SS2D`).
        ssm_drop_rate: dropout after SS2D.
        ssm_recompute: activation checkpointing of the scan's inputs, to save memory (see `SS2D`).
        gate: "silu", "linear" or "none" (see `SS2D`).
        out_norm: "layer", "none", "dwconv", "layer_dwconv", "softmax" or "sigmoid" (see `SS2D`).
        out_act: apply GELU after `out_norm`.
        scan_order: cross2d, unidirectional, bidirectional, or another registered order.
        mlp_ratio: hidden width of the MLPs, as a multiple of the stage's channels; 0 for no MLPs.
        mlp_act: activation of the MLPs: gelu, silu, relu or sigmoid.
        mlp_drop_rate: dropout in the MLPs.
        stem: "v1" (one 4x4 convolution) or "v2" (two 3x3 convolutions).
        stem_stride: 4 as published; with the stem "v2" also 2 or 1, for images of 32 to 64 px. Weights keep
            their shapes, so published ones load.
        downsample: "v1" (patch merging), "v2" (2x2 convolution) or "v3" (3x3 convolution).
        patch_norm: use layer norms in the stem.
        pos_embed: add a position table, resized to the map, to the output of the stem.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 at the first one.

    Shape:
        Input `(B, in_chans, H, W)` with H and W of at least 32. Stage i has stride `stem_stride * 2**i`.

    Raises:
        UsageError: an option has an unknown value, lists of different lengths, classes without pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 8, 2),
        state_dim: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | str = "auto",
        ssm_act: str = "silu",
        ssm_conv_size: int = 3,
        ssm_conv_bias: bool = False,
        ssm_init: str = "v0",
        ssm_drop_rate: float = 0.0,
        ssm_recompute: bool = False,
        gate: str = "none",
        out_norm: str = "layer",
        out_act: bool = False,
        scan_order: str = "cross2d",
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        mlp_drop_rate: float = 0.0,
        stem: str = "v2",
        stem_stride: int = 4,
        downsample: str = "v3",
        patch_norm: bool = True,
        pos_embed: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if len(embed_dims) != len(depths):
            raise UsageError(
                "embed_dims and depths must have one entry per stage, "
                f"got {len(embed_dims)} and {len(depths)}"
            )
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]

        self.stem = make_stem(stem, in_chans, embed_dims[0], patch_norm, stem_stride)
        self.pos_embed: nn.Parameter | None = None
        if pos_embed:
            height, width = (side // stem_stride for side in to_2tuple(img_size))
            self.pos_embed = nn.Parameter(torch.empty(1, embed_dims[0], height, width))
            trunc_normal_(self.pos_embed, std=0.02)

        stages, index, last = [], 0, max(sum(depths) - 1, 1)
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks = [
                VSSBlock(
                    dim,
                    mlp_ratio=mlp_ratio,
                    mlp_act=mlp_act,
                    mlp_drop_rate=mlp_drop_rate,
                    drop_path=drop_path_rate * block / last,
                    state_dim=state_dim,
                    ssm_ratio=ssm_ratio,
                    dt_rank=dt_rank,
                    ssm_act=ssm_act,
                    ssm_conv_size=ssm_conv_size,
                    ssm_conv_bias=ssm_conv_bias,
                    ssm_init=ssm_init,
                    ssm_drop_rate=ssm_drop_rate,
                    ssm_recompute=ssm_recompute,
                    gate=gate,
                    out_norm=out_norm,
                    out_act=out_act,
                    scan_order=scan_order,
                )
                for block in range(index, index + depth)
            ]
            index += depth
            stages.append(
                Stage(make_downsample(downsample, embed_dims[i - 1], dim) if i else nn.Identity(), blocks)
            )
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm2d(self.num_features, eps=EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the position table, if any; timm's rule excludes biases and 1-d parameters."""
        return set() if self.pos_embed is None else {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer-wise learning rates."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^(?:stem|pos_embed)", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing of the blocks."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: "avg" or ""; `None` keeps the pooling.

        Raises:
            UsageError: an unknown pooling, or classes without pooling.
        """
        # mypy: the constructor calls this method, which assigns the attribute below.
        pool = self.global_pool.pool_type if global_pool is None else global_pool  # type: ignore[has-type]
        check_global_pool(pool, num_classes)
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.num_classes = num_classes
        # Device and dtype of the other parameters, which the model may have been moved to.
        head = make_linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head.to(next(self.parameters()))

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages, norm and head that the given intermediates do not need; return their indices."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        if prune_norm or shortened:
            self.norm = nn.Identity()
        return take_indices

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the feature maps of selected stages.

        Args:
            x: images (B, in_chans, H, W).
            indices: number of last stages, list of stage indices, or `None` for all.
            norm: apply the final norm to the map of the last stage.
            stop_early: stop after the last selected stage.
            output_fmt: "NCHW".
            intermediates_only: return only the list of maps.

        Returns:
            The maps (B, C, H, W), or a pair of the output of `forward_features` and the maps.

        Raises:
            UsageError: another `output_fmt`.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        last = len(self.stages) - 1
        intermediates = []
        x = self._embed(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if len(stages) > last else x, intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the normed last map (B, C, H / 32, W / 32 as published)."""
        return self.norm(self.stages(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, H, W) to logits (B, num_classes), or to pooled features (B, C) with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _embed(self, x: Tensor) -> Tensor:
        # The only change of memory format: all following maps stay in channels-last format.
        check_images(x)
        x = self.stem(channels_last(x))
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, x.shape[2], x.shape[3])
        return x


_OUT_NORMS = {
    "onnone": "none",
    "ondwconv3": "dwconv",
    "oncnorm": "layer_dwconv",
    "onsoftmax": "softmax",
    "onsigmoid": "sigmoid",
}
# The official forward types of the first row differ only in kernels and precision.
_SCAN_ORDERS = dict.fromkeys(("v0", "v0seq", "v01", "v02", "v04", "v05", "v2"), "cross2d") | {
    "v051d": "unidirectional",
    "v052d": "bidirectional",
}
# Official argument -> argument of VMamba with the same values.
_SAME = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "ssm_d_state": "state_dim",
    "ssm_ratio": "ssm_ratio",
    "ssm_dt_rank": "dt_rank",
    "ssm_act_layer": "ssm_act",
    "ssm_conv_bias": "ssm_conv_bias",
    "ssm_drop_rate": "ssm_drop_rate",
    "ssm_init": "ssm_init",
    "mlp_ratio": "mlp_ratio",
    "mlp_act_layer": "mlp_act",
    "mlp_drop_rate": "mlp_drop_rate",
    "drop_path_rate": "drop_path_rate",
    "patch_norm": "patch_norm",
    "downsample_version": "downsample",
    "patchembed_version": "stem",
    "posembed": "pos_embed",
    "imgsize": "img_size",
}
# The official code ignores `ssm_rank_ratio`; checkpointing is enabled by `set_grad_checkpointing` here.
_WITHOUT_EFFECT = ("ssm_rank_ratio", "use_checkpoint")
_SPECIAL = ("patch_size", "depths", "dims", "ssm_conv", "forward_type", "norm_layer", "gmlp")
_NEEDED = ("depths", "dims", "ssm_d_state", "ssm_ratio", "ssm_conv", "forward_type", "mlp_ratio")
_NEEDED_TOO = ("downsample_version", "patchembed_version")


def options_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate arguments of the official VMamba constructor (`VSSM`) into those of `VMamba`.

    Args:
        config: such as `{"dims": 96, "depths": [2, 2, 8, 2], "forward_type": "v05_noz", ...}`. Arguments that
            determine the architecture are required; others default to those of `VMamba`.

    Returns:
        Keyword arguments of `VMamba`.

    Raises:
        UsageError: an argument is missing, unknown or not supported: the cascaded scan (`v052dc`), a gated
            MLP, BatchNorm, a patch size other than 4.

    Examples:
        >>> options_from_official({
        ...     "dims": 96, "depths": [2, 2, 5, 2], "ssm_d_state": 1, "ssm_ratio": 2.0, "ssm_conv": 3,
        ...     "forward_type": "v051d_nozact_oact", "mlp_ratio": 4.0, "downsample_version": "v3",
        ...     "patchembed_version": "v2",
        ... })["gate"]
        'linear'
    """
    known = (*_SAME, *_SPECIAL, *_WITHOUT_EFFECT)
    if unknown := [key for key in config if key not in known]:
        raise UsageError(f"unknown arguments of the official VMamba: {', '.join(unknown)}")
    if missing := [key for key in (*_NEEDED, *_NEEDED_TOO) if key not in config]:
        raise UsageError(f"the official VMamba configuration lacks {', '.join(missing)}")
    if config.get("patch_size", 4) != 4:
        raise UsageError(f"patch_size must be 4, got {config['patch_size']}")
    if config.get("gmlp", False):
        raise UsageError("the gated MLP of the official code (gmlp) is not supported, expected gmlp=False")
    # Both are the same layer norm, on maps of different memory layouts.
    check_choice("norm_layer", str(config.get("norm_layer", "ln")).lower(), ("ln", "ln2d"))

    options = {ours: config[theirs] for theirs, ours in _SAME.items() if theirs in config}
    depths, dims = config["depths"], config["dims"]
    options["depths"] = tuple(depths)
    options["embed_dims"] = (
        tuple(dims * 2**i for i in range(len(depths))) if isinstance(dims, int) else tuple(dims)
    )
    options["ssm_conv_size"] = config["ssm_conv"] if config["ssm_conv"] > 1 else 0
    options |= _parse_forward_type(config["forward_type"])
    return options


def _parse_forward_type(forward_type: str) -> dict[str, Any]:
    """Translate the official `forward_type`, such as "v05_onnone_noz"."""
    core, *tags = forward_type.split("_")
    if core.endswith("c") and core[:-1] in _SCAN_ORDERS:
        raise UsageError(f"forward_type {forward_type!r} is the cascaded scan, which is not supported")
    check_choice("the first part of forward_type", core, tuple(_SCAN_ORDERS))
    if core in ("v0", "v0seq"):
        if tags:
            raise UsageError(f"forward_type {core!r} takes no suffix, got {forward_type!r}")
        # The official code fixes these, regardless of its other arguments.
        return {
            "gate": "silu",
            "scan_order": "cross2d",
            "ssm_act": "silu",
            "ssm_conv_size": 3,
            "ssm_conv_bias": True,
        }
    options: dict[str, Any] = {
        "gate": "silu",
        "out_norm": "layer",
        "out_act": False,
        "scan_order": _SCAN_ORDERS[core],
    }
    for tag in tags:
        check_choice("a suffix of forward_type", tag, ("noz", "nozact", "oact", "no32", *_OUT_NORMS))
        if tag in _OUT_NORMS:
            options["out_norm"] = _OUT_NORMS[tag]
        elif tag == "oact":
            options["out_act"] = True
        elif tag in ("noz", "nozact"):
            options["gate"] = "none" if tag == "noz" else "linear"
    return options


# The first pattern that matches the start of a key is applied. Of two alternatives, the second is the name of
# January 2024.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"patch_embed\.(0|proj)\.", "stem.conv1."),
        (r"patch_embed\.(2|norm)\.", "stem.norm1."),
        (r"patch_embed\.5\.", "stem.conv2."),
        (r"patch_embed\.7\.", "stem.norm2."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(norm|ln_1)\.", r"stages.\1.blocks.\2.norm1."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(norm2|ln_2)\.", r"stages.\1.blocks.\2.norm2."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.(op|self_attention)\.", r"stages.\1.blocks.\2.ssm."),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.", r"stages.\1.blocks.\2.mlp."),
        (r"classifier\.(norm|head)\.", r"\1."),
    )
]
_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.downsample\.(1\.|3\.|norm\.|reduction\.)(.+)")
_DOWNSAMPLE_PARTS = {"1.": "conv.", "3.": "norm.", "norm.": "norm.", "reduction.": "reduction."}
_OUT_NORM = re.compile(r"outnorm(\d+)\.(.+)")
_SSM_RENAMES = {
    "A_logs": "A_log",
    "Ds": "D",
    "dt_projs_weight": "dt_weight",
    "dt_projs_bias": "dt_bias",
    "x_proj_weight": "x_proj.weight",
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "out_norm.1.weight": "out_norm.weight",
    "out_norm.2.weight": "out_norm.1.weight",
}


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the official state dict of a whole model to the names of this module.

    Supported are also the names of January 2024, 1x1 convolutions instead of linear layers, and the layout of
    dense tasks, which has one norm per stage and no classifier: its last norm becomes `norm`, the others are
    dropped. Other keys stay unchanged.
    """
    converted: dict[str, Tensor] = {}
    ssm: dict[str, dict[str, Tensor]] = {}
    last = max((int(m[1]) for m in map(_OUT_NORM.fullmatch, state_dict) if m), default=-1)
    for key, tensor in state_dict.items():
        if out_norm := _OUT_NORM.fullmatch(key):
            if int(out_norm[1]) == last and "classifier.norm.weight" not in state_dict:
                converted[f"norm.{out_norm[2]}"] = tensor
            continue
        name = _rename(key)
        prefix, found, leaf = name.partition(".ssm.")
        if found:
            ssm.setdefault(f"{prefix}.ssm.", {})[leaf] = tensor
        else:
            converted[name] = _as_matrix(name, tensor)
    for prefix, entries in ssm.items():
        converted |= {prefix + name: tensor for name, tensor in convert_ss2d(entries).items()}
    return converted


def convert_ss2d(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the official state dict of one SS2D module.

    The official input projection contains that of the gate, which is a layer of its own here.
    """
    converted = {
        _SSM_RENAMES.get(key, key): _as_matrix(key, tensor) if key.endswith("_proj.weight") else tensor
        for key, tensor in state_dict.items()
    }
    if "dt_weight" not in converted or "out_proj.weight" not in converted:
        return converted
    directions, inner, _ = converted["dt_weight"].shape
    if "A_log" in converted:
        converted["A_log"] = converted["A_log"].reshape(directions, inner, -1)
    if "x_proj.weight" in converted:
        converted["x_proj.weight"] = converted["x_proj.weight"].reshape(-1, inner)
    in_proj = converted.get("in_proj.weight")
    if in_proj is not None and in_proj.shape[0] == 2 * inner:
        # Clones, because safetensors cannot save two views of one storage.
        converted["in_proj.weight"], converted["gate_proj.weight"] = (
            half.clone() for half in in_proj.chunk(2)
        )
    return converted


def _rename(key: str) -> str:
    """Convert an official key outside of SS2D."""
    if found := _DOWNSAMPLE.fullmatch(key):
        # An official stage ends with the downsampling; here the next stage begins with it.
        return f"stages.{int(found[1]) + 1}.downsample.{_DOWNSAMPLE_PARTS[found[2]]}{found[3]}"
    for pattern, replacement in _RENAMES:
        if pattern.match(key):
            return pattern.sub(replacement, key, count=1)
    return key


def _as_matrix(name: str, tensor: Tensor) -> Tensor:
    """Convert the weight of a 1x1 convolution to that of a linear layer."""
    linear = name.endswith(("_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight"))
    return tensor.flatten(1) if linear and tensor.ndim == 4 else tensor


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Convert an official or lightspine state dict to the names of this module; resize the position table.

    See `convert_state_dict` for older official layouts and those of dense tasks.
    """
    ours = any(key.startswith("stages.") for key in state_dict)
    converted = dict(state_dict) if ours else convert_state_dict(state_dict)
    table = getattr(model, "pos_embed", None)
    if table is not None and "pos_embed" in converted and converted["pos_embed"].ndim == 4:
        converted["pos_embed"] = resize_pos_embed(converted["pos_embed"], *table.shape[2:])
    return converted


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases"


def _cfg(file: str = "") -> dict[str, Any]:
    return {
        "url": f"{_RELEASES}/download/%23v2cls/{file}" if file else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        "origin_url": _RELEASES,
    }


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.in1k": _cfg("vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small.in1k": _cfg("vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_base.in1k": _cfg("vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_tiny_s2l5": _cfg(),
        "vmamba_small_s1l20": _cfg(),
        "vmamba_base_s1l20": _cfg(),
        "vmamba_tiny_v0": _cfg(),
        "vmamba_small_v0": _cfg(),
        "vmamba_base_v0": _cfg(),
    }
)

_TINY = (96, 192, 384, 768)
_BASE = (128, 256, 512, 1024)
# The first release: Mamba's gated SS2D with 16 states, patch merging, no MLP.
_V0: dict[str, Any] = {
    "state_dim": 16,
    "ssm_ratio": 2.0,
    "ssm_conv_bias": True,
    "gate": "silu",
    "mlp_ratio": 0.0,
    "stem": "v1",
    "downsample": "v1",
}


def _create_vmamba(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model(VMamba, variant, pretrained, default_indices=(0, 1, 2, 3), **kwargs)


def _published(top1: float, macs_g: float, weights: str = "ema") -> Published:
    source = "assets/performance.md of the official repository"
    return Published(top1=top1, macs_g=macs_g, weights=weights, source=source)


@register_model(params=30_249_064, published=_published(82.6, 4.9))
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-T of the paper (s1l8; official config vmambav2v_tiny)."""
    args = {"embed_dims": _TINY, "depths": (2, 2, 8, 2), "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_tiny", pretrained, **args | kwargs)


@register_model(params=50_147_752, published=_published(83.6, 8.7))
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-S of the paper (s2l15; official config vmambav2_small)."""
    args = {"embed_dims": _TINY, "depths": (2, 2, 15, 2), "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_small", pretrained, **args | kwargs)


@register_model(params=88_557_800, published=_published(83.9, 15.4))
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-B of the paper (s2l15; official config vmambav2_base)."""
    args = {"embed_dims": _BASE, "depths": (2, 2, 15, 2), "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_base", pretrained, **args | kwargs)


@register_model(params=30_705_832, published=_published(82.5, 4.9))
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Tiny with fewer, wider scans (official config vmambav2_tiny)."""
    args = {"embed_dims": _TINY, "depths": (2, 2, 5, 2), "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **args | kwargs)


@register_model(params=49_012_840, published=_published(83.3, 8.6))
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Small with more, narrower scans (official config vmambav2v_small)."""
    args = {"embed_dims": _TINY, "depths": (2, 2, 20, 2), "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_small_s1l20", pretrained, **args | kwargs)


@register_model(params=86_614_504, published=_published(83.8, 15.2))
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Base with more, narrower scans (official config vmambav2v_base)."""
    args = {"embed_dims": _BASE, "depths": (2, 2, 20, 2), "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_base_s1l20", pretrained, **args | kwargs)


@register_model(params=22_893_448, published=_published(82.2, 5.6, weights="model"))
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Tiny of the first release (official config vmambav0_tiny)."""
    args = _V0 | {"embed_dims": _TINY, "depths": (2, 2, 9, 2)}
    return _create_vmamba("vmamba_tiny_v0", pretrained, **args | kwargs)


@register_model(params=44_417_416, published=_published(83.5, 11.2))
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Small of the first release (official config vmambav0_small)."""
    args = _V0 | {"embed_dims": _TINY, "depths": (2, 2, 27, 2)}
    return _create_vmamba("vmamba_small_v0", pretrained, **args | kwargs)


@register_model(params=76_254_056, published=_published(83.7, 18.0))
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Base of the first release (official config vmambav0_base)."""
    args = _V0 | {"embed_dims": _BASE, "depths": (2, 2, 27, 2)}
    return _create_vmamba("vmamba_base_v0", pretrained, **args | kwargs)
