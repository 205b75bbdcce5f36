"""VMamba's parts, from small to large: linear maps, SS2D, the VSS block, stems and downsampling.

Maps are `(B, C, H, W)` at every border and lie in memory with channels innermost (`torch.channels_last`), so
that the permutes below rename axes without moving data: a linear map is a plain matrix product, a layer norm
runs over the last axis, and the depthwise convolution reads the same memory as a `channels_last` map.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, trunc_normal_
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.layers.recompute import recompute_before_scan
from lightspine.layers.stem import stem_strides
from lightspine.ops.cross_scan import cross_scan
from lightspine.ops.scan_orders import scan_order as pixel_order

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


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raise `UsageError` unless the value is one of the choices."""
    if value not in choices:
        raise UsageError(f"{option} must be one of {', '.join(choices)}, got {value!r}")


def make_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Return a linear map with the published initial values: normal with deviation 0.02, bias 0."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    # Cut off at +-2, a hundred deviations: in effect a plain normal distribution.
    trunc_normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a (B, H, W, C) map that keeps its size."""

    def __init__(self, dim: int, kernel_size: int, bias: bool):
        super().__init__(dim, dim, kernel_size, padding=(kernel_size - 1) // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


class SpatialSoftmax(nn.Module):
    """Softmax of every channel over the pixels of a (B, H, W, C) map."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


def _make_out_norm(kind: str, dim: int) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(dim, eps=EPS)
    if kind == "dwconv":
        return DepthwiseConv(dim, 3, bias=False)
    if kind == "layer_dwconv":
        return nn.Sequential(nn.LayerNorm(dim, eps=EPS), DepthwiseConv(dim, 3, bias=False))
    if kind == "softmax":
        return SpatialSoftmax()
    return nn.Sigmoid() if kind == "sigmoid" else nn.Identity()


class SS2D(nn.Module):
    """2D selective scan: a selective state space model that crosses the map in four directions.

    Source: VMamba (arXiv:2401.10166), section 4.2 and, for the options, its acceleration path and ablations.

    Args:
        dim: channels of the map.
        state_dim: size N of the state of each channel.
        ssm_ratio: width of the scanned map, as a multiple of `dim`.
        dt_rank: rank of the projection that gives the step sizes; "auto" is `dim / 16`, rounded up.
        act: activation before the scan: silu, gelu, relu or sigmoid.
        conv_size: odd side of the depthwise convolution before the scan; 0 for none.
        conv_bias: whether that convolution has a bias.
        gate: "silu" multiplies the result by SiLU of a second projection of the input (as in Mamba), "linear"
            by that projection itself, "none" has no second projection.
        out_norm: what follows the scan: "layer" norm, "none", "dwconv" (depthwise 3x3), "layer_dwconv" (both
            in this order), "softmax" over the pixels, or "sigmoid".
        out_act: GELU after `out_norm`.
        scan_order: a registered order of `lightspine.ops.cross_scan`: cross2d, unidirectional, bidirectional.
        init: initial values of the state space model: "v0" as in Mamba, "v1" normal, "v2" uniform steps.
        drop_rate: dropout of the result.
        recompute: keep nothing between `in_proj` and the scan for the backward; convolution, activation,
            projections and steps are computed again. Off by default: the paper keeps them.

    Shape:
        `(B, dim, H, W)` of any H and W to `(B, dim, H, W)`.

    Raises:
        UsageError: an option has an unknown value. VMamba's "cascade2d" order, which scans the rows' result
            along the columns, is not offered.

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
            raise UsageError("the scan order 'cascade2d' is not offered: expected one pass over the map")
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
        self.conv = DepthwiseConv(inner, conv_size, conv_bias) if conv_size else nn.Identity()
        self.act = ACTIVATIONS[act]()
        # Rows: for each direction, dt_rank rows of the step, state_dim of B, state_dim of C. Here PyTorch's
        # own initial values are the published ones.
        self.x_proj = nn.Linear(inner, self.directions * rows, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(self.directions, inner, self.dt_rank))
        # Two-dimensional, so that it is decayed as published; the skip is one-dimensional and is not.
        self.dt_bias = nn.Parameter(torch.empty(self.directions, inner))
        self.A_log = nn.Parameter(torch.empty(self.directions, inner, state_dim))
        self.D = nn.Parameter(torch.empty(self.directions * inner))
        self.out_norm = _make_out_norm(out_norm, inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = make_linear(inner, dim, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self._init_ssm(init)

    @torch.no_grad()
    def _init_ssm(self, init: str) -> None:
        nn.init.ones_(self.D)
        if init == "v0":
            nn.init.uniform_(self.dt_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(self.dt_bias).uniform_(low, high).exp_().clamp_(min=1e-4)
            # The inverse of softplus, so that the first steps are log-uniform between 0.001 and 0.1.
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
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
            y = recompute_before_scan(self._scan, inner)
        else:
            y = self._scan(inner)
        y = self.out_act(self.out_norm(y))
        if self.gate != "none":
            y = y * self.gate_act(self.gate_proj(x))
        return self.drop(self.out_proj(y)).permute(0, 3, 1, 2)

    def _scan(self, x: Tensor) -> Tensor:
        """Convolve and activate a (B, H, W, D) map, scan it in all directions and add the results up."""
        u = self.act(self.conv(x))
        batch, height, width, _ = u.shape
        # The projections are pointwise: one product in pixel order serves every direction.
        projected = self.x_proj(u).view(batch, height, width, self.directions, -1)
        dt, B, C = projected.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        delta = torch.einsum("bhwkr,kdr->bhwkd", dt, self.dt_weight)
        # Float32 or wider whatever the precision of the maps: exp(delta * A) forgives no rounding of A.
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        D = self.D.view(self.directions, -1)
        keep = not self.recompute
        y = cross_scan(u, delta, A, B, C, D, self.dt_bias, True, self.scan_order, keep=keep)
        # The sum stays float32 under autocast; a model that was cast as a whole gets its own precision back.
        return y.to(self.out_proj.weight.dtype)


class VSSBlock(nn.Module):
    """Visual state space block: SS2D and an MLP, each behind a layer norm and with a residual connection.

    Source: VMamba (arXiv:2401.10166), section 4.3.

    Args:
        dim: channels of the map.
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`; 0 for a block without MLP.
        mlp_act: activation of the MLP: gelu, silu, relu or sigmoid.
        mlp_drop_rate: dropout in the MLP.
        drop_path: probability of skipping a branch in training.
        state_dim: see `SS2D`, as for all that follow.
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
    """Return the map from the image to the first stage.

    Args:
        version: "v1" is one 4x4 convolution, "v2" two 3x3 convolutions of stride 2.
        in_chans: channels of the image.
        dim: channels of the map; even for "v2".
        norm: whether layer norms follow the convolutions.
        stride: 4 as published; with "v2" also 2 or 1, the first or both convolutions then stepping by 1.

    Returns:
        (B, in_chans, H, W) to (B, dim, H / stride, W / stride). As published, "v1" leaves out up to
        three pixels at the right and bottom of a size that is not a multiple of 4; "v2" rounds up.

    Raises:
        UsageError: an unknown version, an odd `dim` for "v2", or a stride that the stem cannot have.
    """
    check_choice("stem", version, ("v1", "v2"))
    if version == "v1":
        if stride != 4:
            raise UsageError(f"the stem 'v1' has stem_stride=4 only, got {stride}: take stem='v2'")
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
    """Downsampling "v1": four neighbours side by side, layer norm, linear map.

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
        # The row varies faster than the column among the four neighbours.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


def make_downsample(version: str, dim: int, out_dim: int) -> nn.Module:
    """Return a map (B, dim, H, W) to (B, out_dim, H / 2, W / 2): rounded up but for "v2".

    Args:
        version: "v1" is `PatchMerging`, "v2" a 2x2 and "v3" a 3x3 convolution of stride 2 with a layer norm.
        dim: channels before.
        out_dim: channels after.

    Raises:
        UsageError: an unknown version.
    """
    check_choice("downsample", version, ("v1", "v2", "v3"))
    if version == "v1":
        return PatchMerging(dim, out_dim)
    conv = nn.Conv2d(dim, out_dim, 2, 2) if version == "v2" else nn.Conv2d(dim, out_dim, 3, 2, 1)
    return nn.Sequential(OrderedDict([("conv", conv), ("norm", LayerNorm2d(out_dim, eps=EPS))]))
