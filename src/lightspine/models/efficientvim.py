"""EfficientViM: state space backbone that mixes channels in the hidden state instead of at every position.

Paper: "EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality" (CVPR 2025,
arXiv 2411.15241). Official code: https://github.com/mlvlab/EfficientViM (MIT).

Differences from the official code:

- Input of any height and width; the official classifier assumes a square map.
- `forward_features` returns one map: the pooled hidden states of all stages, repeated at every position, and
  the normalized final map. Its mean over positions is the input of the four classifiers.
- A stage begins with its downsampling, so that its output is its feature map.
- Drop path is supported (the paper trains without).

Blocks take and return maps (B, C, H, W). They are fastest in `torch.channels_last` format, in which
flattening and transposing need no copy.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SqueezeExcite, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.layers.arguments import check_batch_statistics, check_choice, check_images, stem_strides
from lightspine.layers.blocks import ConvNorm
from lightspine.layers.checkpointing import checkpoint_module
from lightspine.models.registry import Published, StateDict, build_model, register_model
from lightspine.ops.memory_format import channels_last

__all__ = ["EfficientViM"]

Mixer = Literal["hsm-ssd", "nc-ssd"]


class ChannelNorm(nn.Module):
    """LayerNorm over axis 1 of (B, C, L) or (B, C, H, W).

    Weight and bias are stored as (1, C, 1) or, with `axes=2`, (1, C, 1, 1), as published: a rule that spares
    one-dimensional parameters from weight decay then decays this weight, and the models were trained so.
    """

    def __init__(self, dim: int, axes: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        shape = (1, dim) + (1,) * axes
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, self.eps).movedim(-1, 1)


class _StateMixer(nn.Module):
    """Base class of the mixers: computes how each position writes to and reads from the hidden state."""

    def __init__(self, dim: int, state_dim: int, expand: float) -> None:
        super().__init__()
        if dim < 1 or state_dim < 1 or int(expand * dim) < 1:
            raise UsageError(
                "a mixer needs a positive dim, state_dim and expand * dim, "
                f"got dim={dim}, state_dim={state_dim}, expand={expand}"
            )
        self.bcdt_proj = nn.Conv2d(dim, 3 * state_dim, 1, bias=False)
        self.dwconv = nn.Conv2d(3 * state_dim, 3 * state_dim, 3, padding=1, groups=3 * state_dim, bias=False)
        # A shifts all positions equally, so the softmax over positions cancels it. Checkpoints contain it.
        self.A = nn.Parameter(torch.empty(state_dim).uniform_(1.0, 16.0))
        self.D = nn.Parameter(torch.ones(1))

    def write_and_read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the write and read weights of each position for the N states, both (B, L, N)."""
        b, c, dt = self.dwconv(self.bcdt_proj(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        return b * (dt + self.A).softmax(dim=1), c


class HSMSSD(_StateMixer):
    r"""Hidden-state-mixer SSD (EfficientViM, section 3.2): the channels are mixed in the hidden state.

    From the input x (C, L), L = H W, a pointwise and a depthwise convolution make B, C and dt, each (N, L).
    With W = softmax over positions of dt + A, the hidden state is

        h = x (W * B)^T                       (C, N): a global summary in N vectors
        h <- P_out (h_1 * SiLU(z) + D h_1),   [h_1, z] = P_in h
        y = h C                               (C, L)

    The projections run over N states instead of L positions: 3 C^2 N multiply-adds instead of 3 C^2 L.

    Args:
        dim: channels C of the map.
        state_dim: number N of states.
        expand: width of the projected state, as a multiple of C.

    Raises:
        UsageError: a size is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import HSMSSD
        >>> mixer = HSMSSD(64, state_dim=16)
        >>> mixer(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(self, dim: int, state_dim: int = 64, expand: float = 1.0) -> None:
        super().__init__(dim, state_dim, expand)
        inner_dim = int(expand * dim)
        self.state_channels = dim
        self.hz_proj = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map (B, C, H, W) and the mixed hidden state (B, C, N)."""
        write, read = self.write_and_read(x)
        state = write.transpose(1, 2) @ x.flatten(2).transpose(1, 2)  # B N C
        h, z = self.hz_proj(state).chunk(2, dim=-1)
        state = self.out_proj(h * (F.silu(z) + self.D))
        y = (read @ state).transpose(1, 2)  # B C L
        return y.unflatten(2, (x.shape[2], x.shape[3])), state.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(x)[0]


class NCSSD(_StateMixer):
    """Non-causal SSD, the baseline mixer of the paper: the channels are mixed at every position.

    B, C, dt and W are as in `HSMSSD`; projections and gate apply to the sequence, as in Mamba-2:

        [u, z] = P_in x                       each (expand C, L)
        h = u (W * B)^T                       (expand C, N)
        y = P_out ((h C + D u) * SiLU(z))     (C, L)

    Args:
        dim: channels C of the map.
        state_dim: number N of states.
        expand: width of the projected sequence, as a multiple of C.

    Raises:
        UsageError: a size is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import NCSSD
        >>> mixer = NCSSD(64, state_dim=16)
        >>> mixer(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(self, dim: int, state_dim: int = 64, expand: float = 1.0) -> None:
        super().__init__(dim, state_dim, expand)
        inner_dim = int(expand * dim)
        self.state_channels = inner_dim
        self.uz_proj = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.out_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map (B, C, H, W) and the hidden state (B, expand C, N)."""
        write, read = self.write_and_read(x)
        u, z = self.uz_proj(x.flatten(2).transpose(1, 2)).chunk(2, dim=-1)
        state = write.transpose(1, 2) @ u  # B N C
        y = self.out_proj((read @ state + self.D * u) * F.silu(z)).transpose(1, 2)  # B C L
        return y.unflatten(2, (x.shape[2], x.shape[3])), state.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(x)[0]


class StatefulHSMSSD(HSMSSD):
    """`HSMSSD` that returns its hidden state too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.forward_with_state(x)


class StatefulNCSSD(NCSSD):
    """`NCSSD` that returns its hidden state too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.forward_with_state(x)


class FFN(nn.Sequential):
    """Two pointwise convolutions, each with BatchNorm, and a ReLU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(OrderedDict(fc1=ConvNorm(dim, hidden_dim, act=True), fc2=ConvNorm(hidden_dim, dim)))


class EfficientViMBlock(nn.Module):
    """EfficientViM block (section 3.3): depthwise convolution, mixer, depthwise convolution, FFN.

    Each of the four branches f is combined with its input by a learned gate per channel, x <- (1 - a) x +
    a f(x) with a = sigmoid(alpha). Alpha starts at 1e-4, so the gates start at one half, unlike the small
    layer scale of a residual connection.

    Args:
        dim: channels C of the map.
        state_dim: number N of states of the mixer.
        mlp_ratio: hidden width of the FFN, as a multiple of C.
        expand: inner width of the mixer, as a multiple of C.
        mixer: "hsm-ssd" (`HSMSSD`) or "nc-ssd" (`NCSSD`).
        drop_path: probability of dropping a branch, per sample, in training (0 in the paper).

    Raises:
        UsageError: unknown mixer, or a size that is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import EfficientViMBlock
        >>> block = EfficientViMBlock(64, state_dim=16)
        >>> block(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 64,
        mlp_ratio: float = 4.0,
        expand: float = 1.0,
        mixer: Mixer = "hsm-ssd",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if mixer not in ("hsm-ssd", "nc-ssd"):
            raise UsageError(f"mixer must be 'hsm-ssd' or 'nc-ssd', got {mixer!r}")
        self.dwconv1 = ConvNorm(dim, dim, 3, groups=dim)
        self.norm = ChannelNorm(dim)
        mixer_cls = StatefulHSMSSD if mixer == "hsm-ssd" else StatefulNCSSD
        self.mixer: StatefulHSMSSD | StatefulNCSSD = mixer_cls(dim, state_dim, expand)
        self.dwconv2 = ConvNorm(dim, dim, 3, groups=dim)
        self.ffn = FFN(dim, int(dim * mlp_ratio))
        self.alpha = nn.Parameter(torch.full((4, dim), 1e-4))
        self.drops_paths = drop_path > 0
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def _blend(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        # Under autocast the branches are in half precision; as published, the gate's precision is used here.
        x, update = x.to(gate.dtype), update.to(gate.dtype)
        if self.training and self.drops_paths:
            return x + self.drop_path(gate * (update - x))
        return torch.lerp(x, update, gate)

    def forward_with_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map (B, C, H, W) and the mixer's hidden state (B, C, N)."""
        gate = self.alpha.sigmoid()[:, :, None, None]
        x = self._blend(x, self.dwconv1(x), gate[0])
        update, state = self.mixer(self.norm(x))
        x = self._blend(x, update, gate[1])
        x = self._blend(x, self.dwconv2(x), gate[2])
        return self._blend(x, self.ffn(x), gate[3]), state

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_state(x)[0]


class StatefulEfficientViMBlock(EfficientViMBlock):
    """`EfficientViMBlock` that returns the mixer's hidden state too; the blocks of the models."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.forward_with_state(x)


class Stem(nn.Sequential):
    """Four 3x3 convolutions with BatchNorm, of stride 2 as published, and ReLU after the first three."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__(
            ConvNorm(in_chans, dim // 8, 3, stride=strides[0], act=True),
            ConvNorm(dim // 8, dim // 4, 3, stride=strides[1], act=True),
            ConvNorm(dim // 4, dim // 2, 3, stride=strides[2], act=True),
            ConvNorm(dim // 2, dim, 3, stride=strides[3]),
        )


class PatchMerging(nn.Module):
    """Downsampling: inverted bottleneck with squeeze-excite between two residual depthwise convolutions.

    The hidden width is four times the output width.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        hidden_dim = 4 * out_dim
        self.dwconv1 = ConvNorm(in_dim, in_dim, 3, groups=in_dim)
        self.conv = nn.Sequential(
            ConvNorm(in_dim, hidden_dim, act=True),
            ConvNorm(hidden_dim, hidden_dim, 3, stride=2, groups=hidden_dim, act=True),
            SqueezeExcite(hidden_dim, rd_ratio=0.25),
            ConvNorm(hidden_dim, out_dim),
        )
        self.dwconv2 = ConvNorm(out_dim, out_dim, 3, groups=out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x + self.dwconv1(x))
        return x + self.dwconv2(x)


class Stage(nn.Module):
    """Stage: optional downsampling, then blocks; returns the map and the hidden state of the last block."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[StatefulEfficientViMBlock]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.downsample(x)
        state = x
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x, state = checkpoint_module(block, x)
            else:
                x, state = block(x)
        return x, state


class FusionHead(nn.Module):
    """Classifier with one linear layer per pooled feature vector; the logits are their softmax-weighted sum.

    Args:
        widths: width of each vector; the input (B, sum of widths) is their concatenation.
        num_classes: number of classes.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.widths = list(widths)
        self.weights = nn.Parameter(torch.ones(len(widths)))
        linears = [nn.Linear(width, num_classes) for width in widths]
        for linear in linears:
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.fc = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights.softmax(0)
        parts = x.split(self.widths, dim=1)
        logits = [weights[i] * fc(parts[i]) for i, fc in enumerate(self.fc)]
        return torch.stack(logits).sum(0)


def _describe_stage(index: int, dim: int, stem_stride: int) -> dict[str, Any]:
    return {"num_chs": dim, "reduction": stem_stride * 2**index, "module": f"stages.{index}"}


class EfficientViM(nn.Module):
    """EfficientViM backbone and classifier.

    Args:
        in_chans: channels of the image.
        num_classes: number of classes; 0 for no classifier.
        global_pool: "avg", or "" for no pooling (with `num_classes=0` only).
        dims: channels of each stage.
        depths: blocks of each stage.
        state_dims: number N of hidden states of each stage's mixers.
        stem_stride: 16 as published, or 1, 2, 4 or 8 for small images: the first convolutions of the stem
            then have stride 1. Weights keep their shapes, so published ones load. Use 4 for images of 32 px
            and 4 or 8 for 64 px; with 16 their last map has a single pixel.
        mlp_ratio: hidden width of the FFNs, as a multiple of the stage's channels.
        expand: inner width of the mixers, as a multiple of the stage's channels.
        mixer: "hsm-ssd" or "nc-ssd", see `EfficientViMBlock`.
        distilled: add a second classifier for distillation; `forward` returns `(logits, logits_dist)` in
            training and their mean in evaluation.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 at the first one.

    Raises:
        UsageError: an unknown value, an unsupported `stem_stride`, or dims, depths and state_dims of
            different lengths.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        dims: Sequence[int] = (128, 192, 320),
        depths: Sequence[int] = (2, 2, 2),
        state_dims: Sequence[int] = (49, 25, 9),
        stem_stride: int = 16,
        mlp_ratio: float = 4.0,
        expand: float = 1.0,
        mixer: Mixer = "hsm-ssd",
        distilled: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < len(dims) == len(depths) == len(state_dims) or min(depths) < 1:
            raise UsageError(
                "dims, depths and state_dims need one positive entry per stage, "
                f"got dims={dims}, depths={depths}, state_dims={state_dims}"
            )
        self.distilled = distilled
        self.distilled_training = distilled
        self.global_pool: str = global_pool
        self.stem = Stem(in_chans, dims[0], stem_strides(stem_stride, 4))

        total = sum(depths)
        drop_paths = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        stages = []
        self.head_widths = []
        for i, (dim, depth, state_dim) in enumerate(zip(dims, depths, state_dims, strict=True)):
            blocks = [
                StatefulEfficientViMBlock(dim, state_dim, mlp_ratio, expand, mixer, next(drop_paths))
                for _ in range(depth)
            ]
            self.head_widths.append(blocks[-1].mixer.state_channels)
            stages.append(Stage(PatchMerging(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.stages = nn.ModuleList(stages)
        self.feature_info = [_describe_stage(i, dim, stem_stride) for i, dim in enumerate(dims)]

        self.head_widths.append(dims[-1])
        self.num_features = self.head_hidden_size = sum(self.head_widths)
        axes = [1] * len(stages) + [2]
        self.norm = nn.ModuleList(ChannelNorm(*args) for args in zip(self.head_widths, axes, strict=True))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Return no names: timm's rule for 1-d parameters and biases gives the published groups.

        1-d parameters such as A, D and the fusion weights are not decayed; the LayerNorm weights and alpha,
        which are not 1-d, are.
        """
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer-wise learning rates."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing of the blocks."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both logits in training, or with `enable=False` their mean as in evaluation.

        Raises:
            UsageError: the model has only one classifier.
        """
        if enable and not self.distilled:
            raise UsageError(
                "expected a model with a distillation head (distilled=True), this one has a single head"
            )
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the classifier, or both for a distilled model."""
        return (self.head, self.head_dist) if self.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: "avg" or ""; `None` keeps the pooling.

        Raises:
            UsageError: unknown pooling, or a classifier without pooling.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in ("avg", "") or num_classes < 0 or (num_classes and not global_pool):
            raise UsageError(
                "expected global_pool='avg', or '' together with num_classes=0, "
                f"got global_pool={global_pool!r} and num_classes={num_classes}"
            )
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head = self._new_head()
        self.head_dist = self._new_head() if self.distilled else nn.Identity()

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = next(self.parameters())
        head = FusionHead(self.head_widths, self.num_classes).to(device=like.device, dtype=like.dtype)
        return head.train(self.training)

    def _embed(self, x: Tensor) -> Tensor:
        check_images(x)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_batch_statistics(self, x)
        # In channels-last format, convolutions and LayerNorm need no copy.
        return self.stem(channels_last(x))

    def _fuse(self, states: list[Tensor], x: Tensor) -> Tensor:
        """Concatenate pooled states (B, C_i), repeated at every position, and the final map (B, C, H, W)."""
        x = self.norm[-1](x)
        pooled = torch.cat(states, dim=1)[:, :, None, None]
        return torch.cat([pooled.expand(-1, -1, x.shape[2], x.shape[3]), x], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to (B, num_features, ceil(H/S), ceil(W/S)).

        The stride S is four times the stem's, 64 as published. The last `feature_info[-1]["num_chs"]`
        channels are the normalized final map; the others are the normalized, pooled hidden states.
        """
        x = self._embed(x)
        states: list[Tensor] = []
        for stage, norm in zip(self.stages, self.norm):  # noqa: B905 (one norm more: that of the map)
            x, state = stage(x)
            states.append(norm(state).mean(-1))
        return self._fuse(states, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map the output of `forward_features` to logits (B, num_classes), or two logits (see `distilled`).

        With `pre_logits` or without a classifier it returns the pooled vector (B, num_features), or with
        `global_pool=""` the map.
        """
        if self.global_pool:
            x = x.mean((2, 3))
        x = self.head_drop(x)
        if pre_logits or self.num_classes == 0:
            return x
        if self.distilled:
            both = self.training and self.distilled_training
            if both and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                return self.head(x), self.head_dist(x)
            return (self.head(x) + self.head_dist(x)) / 2
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (B, in_chans, H, W) to logits (B, num_classes), or two logits (see `distilled`)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the feature maps of selected stages, with the final features unless `intermediates_only`.

        Args:
            x: images (B, in_chans, H, W).
            indices: number of last stages, list of stage indices, or `None` for all.
            norm: apply the final norm to the map of the last stage.
            stop_early: stop after the last selected stage, whose map is then the final features.
            output_fmt: "NCHW".
            intermediates_only: return only the list of maps.

        Raises:
            UsageError: another `output_fmt`.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early or intermediates_only else self.stages
        x = self._embed(x)
        maps: list[Tensor] = []
        states: list[Tensor] = []
        for i, stage in enumerate(stages):
            x, state = stage(x)
            if i in take:
                maps.append(self.norm[-1](x) if norm and i == len(self.stages) - 1 else x)
            if not intermediates_only:
                states.append(self.norm[i](state).mean(-1))
        if intermediates_only:
            return maps
        return (self._fuse(states, x) if len(stages) == len(self.stages) else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one in `indices`, the norms and the classifier; return `indices`.

        Raises:
            UsageError: stages would be removed but not the classifier, which uses all of them.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        if last + 1 < len(self.stages):
            if not prune_head:
                raise UsageError("the classifier uses every stage: removing stages requires prune_head=True")
            prune_norm = True
            self.stages = self.stages[: last + 1]
            self.head_widths = [*self.head_widths[: last + 1], self.feature_info[last]["num_chs"]]
            self.num_features = self.head_hidden_size = sum(self.head_widths)
        if prune_head:
            self.reset_classifier(0)
        if prune_norm:
            self.norm = nn.ModuleList(nn.Identity() for _ in range(last + 2))
        return take


_RENAMES = (
    (r"^patch_embed\.conv\.", "stem."),
    (r"\.mixer\.BCdt_proj\.conv\.", ".mixer.bcdt_proj."),
    (r"\.mixer\.dw\.conv\.", ".mixer.dwconv."),
    (r"\.mixer\.(hz|out)_proj\.conv\.", r".mixer.\1_proj."),
    (r"^heads(_dist)?\.", r"head\1.fc."),
    (r"^weights(_dist)?$", r"head\1.weights"),
)


def _rename(key: str) -> str:
    """Convert an official key."""
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    # An official stage ends with the downsampling; here the next stage begins with it.
    return re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)


def _is_used(name: str, model: EfficientViM) -> bool:
    """Return whether the model has the optional part to which a tensor belongs."""
    if name.startswith("head_dist.") and not model.distilled:
        return False
    if name in ("head.weights", "head_dist.weights"):
        return model.num_classes > 0
    numbered = re.match(r"(stages|norm)\.(\d+)\.", name)
    if not numbered:
        return True
    parts = list(getattr(model, numbered[1]))
    return int(numbered[2]) < len(parts) and not isinstance(parts[int(numbered[2])], nn.Identity)


def checkpoint_filter_fn(state_dict: StateDict, model: EfficientViM) -> StateDict:
    """Convert an official, timm or lightspine state dict to the names and shapes of this module.

    timm's names are the official ones, with LayerNorm weights of shape (C,). Tensors of parts that the model
    does not have are dropped: the second classifier of a model that is not distilled, the fusion weights of a
    model without a classifier, and stages that `features_only` removed.
    """
    ours = "stem.0.conv.weight" in state_dict
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    out = {}
    for key, value in state_dict.items():
        name = key if ours else _rename(key)
        if not _is_used(name, model):
            continue
        shape = shapes.get(name, value.shape)
        # The layouts differ in axes of length one; the loader reports any other difference.
        same = [side for side in shape if side != 1] == [side for side in value.shape if side != 1]
        out[name] = value.reshape(shape) if same and shape != value.shape else value
    return out


def _cfg(name: str, tag: str) -> dict[str, Any]:
    distilled, size = name.endswith("_dist"), 256 if name.startswith("m4") else 224
    heads = ("head", "head_dist") if distilled else ("head",)
    return {
        # The authors' files lie in a Google Drive folder; these are timm's conversions of them.
        "hf_hub_id": f"timm/efficientvim_{name}.{tag}",
        "hf_hub_filename": "model.safetensors",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "min_input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": tuple(f"{head}.fc.{i}" for head in heads for i in range(4)),
        "paper_ids": "arXiv:2411.15241",
        "origin_url": "https://github.com/mlvlab/EfficientViM",
        "license": "mit",
    }


_TAGS = {"": ("e300_in1k", "e450_in1k"), "_dist": ("in1k",)}
default_cfgs = generate_default_cfgs(
    {
        f"efficientvim_{size}{suffix}.{tag}": _cfg(f"{size}{suffix}", tag)
        for size in ("m1", "m2", "m3", "m4")
        for suffix, tags in _TAGS.items()
        for tag in tags
    }
)


def _published(top1: float, macs_g: float, note: str) -> Published:
    return Published(
        top1=top1, macs_g=macs_g, weights="ema", note=note, source="README of the official repository"
    )


_M1 = {"dims": (128, 192, 320), "depths": (2, 2, 2), "state_dims": (49, 25, 9)}
_M2 = {"dims": (128, 256, 512), "depths": (2, 2, 2), "state_dims": (49, 25, 9)}
_M3 = {"dims": (224, 320, 512), "depths": (2, 2, 2), "state_dims": (49, 25, 9)}
_M4 = {"dims": (224, 320, 512), "depths": (3, 4, 2), "state_dims": (64, 32, 16)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model(EfficientViM, variant, pretrained, default_indices=(0, 1, 2), **kwargs)


@register_model(params=6_679_458, published=_published(72.9, 0.239, "300 epochs; 73.5 after 450"))
def efficientvim_m1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M1."""
    return _create("efficientvim_m1", pretrained, **_M1 | kwargs)


@register_model(
    params=7_643_462, published=_published(74.6, 0.239, "300 epochs, hard distillation from RegNetY-16GF")
)
def efficientvim_m1_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M1 with a second classifier for a teacher's labels."""
    return _create("efficientvim_m1_dist", pretrained, **_M1 | {"distilled": True} | kwargs)


@register_model(params=13_903_842, published=_published(75.4, 0.355, "300 epochs; 75.8 after 450"))
def efficientvim_m2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M2."""
    return _create("efficientvim_m2", pretrained, **_M2 | kwargs)


@register_model(
    params=15_315_846, published=_published(76.7, 0.355, "300 epochs, hard distillation from RegNetY-16GF")
)
def efficientvim_m2_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M2 with a second classifier for a teacher's labels."""
    return _create("efficientvim_m2_dist", pretrained, **_M2 | {"distilled": True} | kwargs)


@register_model(params=16_604_174, published=_published(77.6, 0.656, "300 epochs; 77.9 after 450"))
def efficientvim_m3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M3."""
    return _create("efficientvim_m3", pretrained, **_M3 | kwargs)


@register_model(
    params=18_176_178, published=_published(79.1, 0.656, "300 epochs, hard distillation from RegNetY-16GF")
)
def efficientvim_m3_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M3 with a second classifier for a teacher's labels."""
    return _create("efficientvim_m3_dist", pretrained, **_M3 | {"distilled": True} | kwargs)


@register_model(params=19_606_505, published=_published(79.4, 1.111, "300 epochs; 79.6 after 450"))
def efficientvim_m4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M4."""
    return _create("efficientvim_m4", pretrained, **_M4 | kwargs)


@register_model(
    params=21_178_509, published=_published(80.7, 1.111, "300 epochs, hard distillation from RegNetY-16GF")
)
def efficientvim_m4_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientViM-M4 with a second classifier for a teacher's labels."""
    return _create("efficientvim_m4_dist", pretrained, **_M4 | {"distilled": True} | kwargs)
