"""VMamba: visual state space backbones built on the 2D selective scan (SS2D).

Paper: "VMamba: Visual State Space Model", Liu et al., NeurIPS 2024, arXiv:2401.10166.
Official code: https://github.com/MzeroMiko/VMamba (MIT).

Different on purpose: typed options stand for the official strings (`options_from_official` translates them);
one layout, channels innermost, stands for its two; a stage begins with its downsampling, so that a stage's
map is its output; patch merging pads odd maps in both directions; the cascaded scan (one ablation) is not
offered.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, SelectAdaptivePool2d, to_2tuple, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.models._build import build_model
from lightspine.models._registry import Published, StateDict, register_model
from lightspine.models._vmamba_blocks import (
    EPS,
    SS2D,
    VSSBlock,
    check_choice,
    make_downsample,
    make_linear,
    make_stem,
)
from lightspine.models._vmamba_official import convert_state_dict, options_from_official, resize_pos_embed

__all__ = ["SS2D", "VMamba", "VSSBlock", "options_from_official"]

# A leaf in traced graphs: it leaves the table as it is at the size that it was made for, which is a branch.
torch.fx.wrap("resize_pos_embed")


class Stage(nn.Module):
    """An optional downsampling, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the stage's map."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class VMamba(nn.Module):
    """VMamba backbone and classifier.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 for none.
        global_pool: "avg", or "" to leave the last map as it is (then `num_classes` must be 0).
        img_size: image size for which the position table is made; of no effect without `pos_embed`.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        state_dim: size of the state of each scanned channel.
        ssm_ratio: width of the scanned map, as a multiple of the stage's channels.
        dt_rank: rank of the step projection; "auto" is a 16th of the stage's channels, rounded up.
        ssm_act: activation before the scan: silu, gelu, relu or sigmoid.
        ssm_conv_size: side of the depthwise convolution before the scan; 0 for none.
        ssm_conv_bias: whether that convolution has a bias.
        ssm_init: initial values of the state space model, "v0", "v1" or "v2" (see `SS2D`).
        ssm_drop_rate: dropout after SS2D.
        ssm_recompute: compute what the scan reads again in the backward: less memory (see `SS2D`).
        gate: "silu", "linear" or "none" (see `SS2D`).
        out_norm: "layer", "none", "dwconv", "layer_dwconv", "softmax" or "sigmoid" (see `SS2D`).
        out_act: GELU after `out_norm`.
        scan_order: cross2d, unidirectional, bidirectional, or one that was registered.
        mlp_ratio: hidden width of the MLPs, as a multiple of the stage's channels; 0 for blocks without.
        mlp_act: activation of the MLPs: gelu, silu, relu or sigmoid.
        mlp_drop_rate: dropout in the MLPs.
        stem: "v1" (one 4x4 convolution) or "v2" (two 3x3 convolutions).
        stem_stride: 4 as published; with the stem "v2" also 2 or 1, for images of 32 to 64 px. Every weight
            keeps its shape, so published ones load.
        downsample: "v1" (patch merging), "v2" (2x2 convolution) or "v3" (3x3 convolution).
        patch_norm: layer norms in the stem.
        pos_embed: add a position table to the first map; it is resized to the map.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first one.

    Shape:
        Input `(B, in_chans, H, W)` with H and W from 32 up; the stages' maps have 1, 2, 4, 8 times the stem's
        stride.

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
        """Return the position table, if any; norms, biases and skips are spared by their shape or name."""
        return set() if self.pos_embed is None else {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the regular expressions that group the parameters by depth."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^(?:stem|pos_embed)", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: width of the new classifier; 0 for none.
            global_pool: "avg", "" or `None` to keep the pooling.

        Raises:
            UsageError: an unknown pooling, or classes without pooling.
        """
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise UsageError(f"global_pool must be 'avg' or '', got {global_pool!r}")
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if num_classes and not self.global_pool.pool_type:
            raise UsageError(
                f"a classifier needs global_pool='avg', got global_pool='' with {num_classes} classes"
            )
        self.num_classes = num_classes
        # On the device and in the precision of the rest, wherever the model was moved since it was made.
        head = make_linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head.to(next(self.parameters()))

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norm and head that the given intermediates do not need; return their indices."""
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
        """Return the maps of chosen stages.

        Args:
            x: images, (B, in_chans, H, W).
            indices: stages to return; a number takes the last ones, `None` all.
            norm: apply the final norm to the map of the last stage.
            stop_early: leave out the stages after the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.

        Returns:
            The maps (B, C, H, W), or the pair of what `forward_features` returns and the maps.

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
        # The only change of layout: all maps that follow keep their channels innermost.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, x.shape[2], x.shape[3])
        return x


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Map the published layout to ours and leave ours as it is; resize the position table to the model's.

    See `convert_state_dict` for the older and the dense-task layouts, which are taken as well.
    """
    ours = any(key.startswith("stages.") for key in state_dict)
    converted = dict(state_dict) if ours else convert_state_dict(state_dict)
    table = getattr(model, "pos_embed", None)
    if table is not None and "pos_embed" in converted and converted["pos_embed"].ndim == 4:
        converted["pos_embed"] = resize_pos_embed(converted["pos_embed"], *table.shape[2:])
    return converted


def _cfg() -> dict[str, Any]:
    return {
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
        "origin_url": "https://github.com/MzeroMiko/VMamba",
    }


default_cfgs = generate_default_cfgs(
    {
        name: _cfg()
        for name in (
            "vmamba_tiny",
            "vmamba_small",
            "vmamba_base",
            "vmamba_tiny_s2l5",
            "vmamba_small_s1l20",
            "vmamba_base_s1l20",
            "vmamba_tiny_v0",
            "vmamba_small_v0",
            "vmamba_base_v0",
        )
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
