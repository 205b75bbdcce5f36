"""EfficientMod: an MLP block whose hidden features are multiplied by their convolutional context.

Paper: "Efficient Modulation for Vision Networks", Ma et al., ICLR 2024, arXiv:2403.19963.
Official code: https://github.com/ma-xu/EfficientMod (Apache-2.0).

Differences from the official code: its factories ignore the number of classes and the drop rates; the
drop-path rate of 0.02 of the two larger variants belongs to the recipe, so the default here is 0; a stage
begins with its downsampling instead of ending with that of the next stage.

Blocks take and return maps `(B, C, H, W)` and compute in channels-last memory format, in which linear layers,
norms and the depthwise convolution need no copy.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import PretrainedCfg, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.layers.arguments import check_choice, check_global_pool, check_images, check_stem_stride
from lightspine.layers.attention import attention
from lightspine.layers.blocks import Stage
from lightspine.layers.plain import is_plain
from lightspine.models.registry import Published, StateDict, build_model, register_model
from lightspine.ops.derivatives import in_transform
from lightspine.ops.memory_format import channels_last

__all__ = ["EfficientMod", "EfficientModAttentionBlock", "EfficientModBlock"]

Fusion = Literal["product", "sum"]


class ContextLayer(nn.Module):
    """Context of each position: linear layer `f`, depthwise convolution, GELU, linear layer `g`."""

    def __init__(self, dim: int, kernel_size: int, context_f: bool, context_g: bool):
        super().__init__()
        self.f = nn.Linear(dim, dim) if context_f else nn.Identity()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.act = nn.GELU()
        self.g = nn.Linear(dim, dim) if context_g else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        x = self.conv(self.f(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.g(self.act(x))


class ModulationMlp(nn.Module):
    """MLP whose hidden features are modulated by their context (section 3.2)."""

    def __init__(
        self,
        dim: int,
        expand_ratio: int,
        kernel_size: int,
        context_f: bool,
        context_g: bool,
        fusion: Fusion,
    ):
        super().__init__()
        self.expand_ratio = expand_ratio
        self.sums = fusion == "sum"
        self.context = ContextLayer(dim, kernel_size, context_f, context_g)
        self.fc1 = nn.Linear(dim, dim * expand_ratio)
        # As published, there is no activation without expansion.
        self.act = nn.GELU() if expand_ratio > 1 else nn.Identity()
        self.fc2 = nn.Linear(dim * expand_ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        # (B, H, W, r, C): the context is broadcast to the r groups of hidden channels.
        context = self.context(x).unsqueeze(3)
        value = self.act(self.fc1(x).unflatten(3, (self.expand_ratio, -1)))
        if self._overwrites_hidden():
            fused = value.add_(context) if self.sums else value.mul_(context)
        else:
            fused = value + context if self.sums else value * context
        return self.fc2(fused.flatten(3))

    def _overwrites_hidden(self) -> bool:
        """Return whether the hidden features may be overwritten: allocating memory takes time on large maps.

        Not if a hook may have kept them, and not under transforms, where only some tensors may be batched.
        """
        # TorchScript skips a branch only if its condition stands alone.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return True
        return (
            not in_transform()
            and is_plain(self.fc1, nn.Linear)
            and (is_plain(self.act, nn.GELU) or is_plain(self.act, nn.Identity))
        )


class EfficientModBlock(nn.Module):
    """EfficientMod modulation block: norm, MLP modulated by its context, residual connection (section 3.2).

    Args:
        dim: channels of the map.
        expand_ratio: hidden width as a multiple of `dim`; the paper's models alternate 1 with 4 or 6.
        kernel_size: odd kernel size of the context's depthwise convolution.
        context_f: use the linear layer before the context's convolution; `False` is an ablation of the paper.
        context_g: use the linear layer after it; `False` is an ablation of the paper.
        fusion: "product" of context and values, or "sum", an ablation of the paper.
        drop_path: probability of dropping the branch, per sample, in training.
        layer_scale_init: initial layer scale of the residual branch.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W; the output is `channels_last` in memory.

    Raises:
        UsageError: `kernel_size` is not odd and positive, `expand_ratio` is below 1, or `fusion` is unknown.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import EfficientModBlock
        >>> block = EfficientModBlock(dim=32, expand_ratio=6, kernel_size=7)
        >>> block(torch.randn(2, 32, 14, 9)).shape
        torch.Size([2, 32, 14, 9])
    """

    def __init__(
        self,
        dim: int,
        expand_ratio: int = 6,
        kernel_size: int = 7,
        *,
        context_f: bool = True,
        context_g: bool = True,
        fusion: Fusion = "product",
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-4,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"kernel_size must be odd and positive, got {kernel_size}")
        if expand_ratio < 1:
            raise UsageError(f"expand_ratio must be at least 1, got {expand_ratio}")
        if fusion not in ("product", "sum"):
            raise UsageError(f"fusion must be 'product' or 'sum', got {fusion!r}")
        self.norm = nn.LayerNorm(dim)
        self.mlp = ModulationMlp(dim, expand_ratio, kernel_size, context_f, context_g, fusion)
        self.gamma = nn.Parameter(layer_scale_init * torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        x = x + self.drop_path(self.gamma * self.mlp(self.norm(x)))
        return x.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention without position encoding and with a minimum width of the heads."""

    def __init__(self, dim: int, num_heads: int, min_head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = max(dim // num_heads, min_head_dim)
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=False)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out.transpose(1, 2).reshape(B, H, W, self.num_heads * self.head_dim))


class EfficientModAttentionBlock(nn.Module):
    """EfficientMod attention block: self-attention and an MLP, each residual and without layer scale.

    Args:
        dim: channels of the map.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP, as a multiple of `dim`.
        min_head_dim: minimum width of a head; the inner width is at least `num_heads * min_head_dim`.
        drop_path: probability of dropping a branch, per sample, in training.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W; the output is `channels_last` in memory.

    Raises:
        UsageError: `num_heads` or `min_head_dim` below 1.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import EfficientModAttentionBlock
        >>> block = EfficientModAttentionBlock(dim=128)
        >>> block(torch.randn(2, 128, 7, 5)).shape
        torch.Size([2, 128, 7, 5])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        *,
        min_head_dim: int = 32,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if num_heads < 1 or min_head_dim < 1:
            raise UsageError(
                f"num_heads and min_head_dim must be at least 1, got {num_heads} and {min_head_dim}"
            )
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, min_head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1).contiguous()
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Strided convolution with bias and LayerNorm over the channels, used as stem and downsampling."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__()
        # As published, all convolutions of EfficientMod keep PyTorch's default initialization.
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride)) in channels-last format."""
        x = self.conv(channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer as published; other modules are not changed."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class EfficientMod(nn.Module):
    """EfficientMod backbone and classifier.

    Args:
        in_chans: channels of the image.
        num_classes: number of classes; 0 for no classifier.
        global_pool: "avg", or "" for no pooling (with `num_classes=0` only).
        embed_dims: channels of each stage.
        depths: modulation blocks of each stage.
        expand_ratios: expansion ratios of the modulation blocks; block i of a stage has ratio
            `expand_ratios[i % len(expand_ratios)]`.
        attention_depths: attention blocks of each stage, after its modulation blocks.
        attention_mlp_ratios: MLP ratio of the attention blocks of each stage.
        stem_stride: 4 as published, or 1 or 2 for images of 32 to 64 px. Weights keep their shapes, so
            published ones load.
        num_heads: heads of the attention blocks.
        kernel_size: kernel size of the depthwise convolution of the context.
        context_f: see `EfficientModBlock`.
        context_g: see `EfficientModBlock`.
        fusion: see `EfficientModBlock`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 at the first one.
            The published recipe uses 0.02 for `efficientmod_s` and `efficientmod_s_conv`, 0 for the others.

    Shape:
        Input `(B, in_chans, H, W)` with H and W of at least 32. Stage i has stride `stem_stride * 2**i`.

    Raises:
        UsageError: lists of different lengths, an unknown `global_pool`, `fusion` or `stem_stride`, classes
            without pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 6, 2),
        expand_ratios: Sequence[int] = (1, 6),
        attention_depths: Sequence[int] = (0, 0, 1, 2),
        attention_mlp_ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        stem_stride: int = 4,
        num_heads: int = 8,
        kernel_size: int = 7,
        context_f: bool = True,
        context_g: bool = True,
        fusion: Fusion = "product",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        lengths = [len(sizes) for sizes in (embed_dims, depths, attention_depths, attention_mlp_ratios)]
        if len(set(lengths)) > 1:
            raise UsageError(
                "embed_dims, depths, attention_depths and attention_mlp_ratios must be equally long, "
                f"got lengths {', '.join(map(str, lengths))}"
            )
        check_stem_stride(stem_stride, [1, 2, 4])
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]

        total = sum(depths) + sum(attention_depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        self.stem = ConvNorm(in_chans, embed_dims[0], kernel_size=7, stride=stem_stride)
        stages = []
        self.feature_info = []
        width = embed_dims[0]
        for i, dim in enumerate(embed_dims):
            blocks: list[nn.Module] = [
                EfficientModBlock(
                    dim,
                    expand_ratios[j % len(expand_ratios)],
                    kernel_size,
                    context_f=context_f,
                    context_g=context_g,
                    fusion=fusion,
                    drop_path=next(rates),
                )
                for j in range(depths[i])
            ]
            blocks += [
                EfficientModAttentionBlock(dim, num_heads, attention_mlp_ratios[i], drop_path=next(rates))
                for _ in range(attention_depths[i])
            ]
            downsample = ConvNorm(width, dim, kernel_size=3, stride=2) if i else nn.Identity()
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            )
            width = dim
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return no names: timm's rule for 1-d parameters and biases gives the published groups."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer-wise learning rates."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing of the blocks."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: "avg" or ""; `None` keeps the pooling.

        Raises:
            UsageError: an unknown pooling, or classes without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        check_global_pool(pool, num_classes)
        self.global_pool = pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        init_linear(self.head)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages, norm and head that the given intermediates do not need; return their indices."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def _apply_norm(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the feature maps of selected stages, with the last map unless `intermediates_only`.

        Args:
            x: images (B, in_chans, H, W).
            indices: number of last stages, list of stage indices, or `None` for all.
            norm: apply the final norm to the map of the last stage.
            stop_early: stop after the last selected stage.
            output_fmt: "NCHW".
            intermediates_only: return only the list of maps.

        Raises:
            UsageError: another `output_fmt`.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        take_indices, last = feature_take_indices(len(self.stages), indices)
        check_images(x)
        x = self.stem(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                is_final = i == len(self.stages) - 1
                intermediates.append(self._apply_norm(x) if norm and is_final else x)
        if intermediates_only:
            return intermediates
        complete = last == len(self.stages) - 1 or not stop_early
        return self._apply_norm(x) if complete else x, intermediates

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the normalized last map, of stride 32 as published."""
        check_images(x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self._apply_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last map to logits, or to pooled features (B, head_hidden_size) with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits."""
        return self.forward_head(self.forward_features(x))


def _cfg(drive_folder: str) -> PretrainedCfg:
    return PretrainedCfg(
        input_size=(3, 224, 224),
        min_input_size=(3, 32, 32),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_classes=1000,
        first_conv="stem.conv",
        classifier="head",
        license="apache-2.0",
        paper_ids="arXiv:2403.19963",
        paper_name="Efficient Modulation for Vision Networks",
        # Programs cannot download from it.
        origin_url=f"https://drive.google.com/drive/folders/{drive_folder}",
    )


default_cfgs = generate_default_cfgs(
    {
        "efficientmod_xxs": _cfg("1c0dlnN7w1bHlAsKcJFhGVA2mIhoA6ZHz"),
        "efficientmod_xs": _cfg("1PPQFO891WfJRUiH58NlWOgHDEzDnwC0_"),
        "efficientmod_s": _cfg("1rJs8LcWmdTFmj-IJ0cmlVp_MxGfZFsFk"),
        "efficientmod_s_conv": _cfg("1EY637XRiDPL4AwrVGESJWsK-ZP2GhnaI"),
    }
)

# No pattern matches a name of this module, so lightspine files pass unchanged.
_KEY_RULES = [
    (re.compile(r"^patch_embed\.proj\."), "stem.conv."),
    (re.compile(r"^patch_embed\.norm\."), "stem.norm."),
    (re.compile(r"\.downsample\.proj\."), ".downsample.conv."),
    (re.compile(r"\.gamma_1$"), ".gamma"),
    (re.compile(r"\.context_layer\.context_list\.0\."), ".context.conv."),
    (re.compile(r"\.context_layer\."), ".context."),
    (re.compile(r"^layers\.(\d+)\.blocks\."), r"stages.\1.blocks."),
]


def _rename(key: str) -> str:
    """Convert an official key; keys of this module stay unchanged."""
    for pattern, replacement in _KEY_RULES:
        key = pattern.sub(replacement, key)
    if behind_stage := re.match(r"layers\.(\d+)\.(downsample\..+)", key):
        key = f"stages.{int(behind_stage[1]) + 1}.{behind_stage[2]}"
    return key


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Convert an official or lightspine state dict; the head is dropped for a model without classes."""
    renamed = {_rename(key): value for key, value in state_dict.items()}
    if isinstance(model.head, nn.Identity):
        renamed = {key: value for key, value in renamed.items() if not key.startswith("head.")}
    return renamed


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model(EfficientMod, variant, pretrained, default_indices=(0, 1, 2, 3), **kwargs)


_SOURCE = "README of the official code; multiply-adds from the paper"
_DISTILLED = "distilled with regnety_160"


@register_model(
    params=4_736_264,
    published=Published(top1=77.1, macs_g=0.6, weights="ema", note=_DISTILLED, source=_SOURCE),
)
def efficientmod_xxs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientMod-xxs."""
    return _create("efficientmod_xxs", pretrained, **kwargs)


@register_model(
    params=6_627_544,
    published=Published(top1=79.4, macs_g=0.8, weights="ema", note=_DISTILLED, source=_SOURCE),
)
def efficientmod_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientMod-xs."""
    sizes: dict[str, Any] = {
        "embed_dims": (32, 64, 144, 288),
        "depths": (3, 3, 4, 2),
        "expand_ratios": (1, 4),
        "attention_depths": (0, 0, 3, 3),
    }
    return _create("efficientmod_xs", pretrained, **(sizes | kwargs))


@register_model(
    params=12_897_184,
    published=Published(top1=81.9, macs_g=1.4, weights="ema", note=_DISTILLED, source=_SOURCE),
)
def efficientmod_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientMod-s; the published recipe has `drop_path_rate=0.02`."""
    sizes: dict[str, Any] = {
        "embed_dims": (32, 64, 144, 312),
        "depths": (4, 4, 8, 4),
        "attention_depths": (0, 0, 4, 4),
        "attention_mlp_ratios": (4.0, 4.0, 4.0, 5.0),
    }
    return _create("efficientmod_s", pretrained, **(sizes | kwargs))


@register_model(
    params=12_872_336,
    published=Published(top1=80.5, macs_g=1.5, weights="ema", source=_SOURCE),
)
def efficientmod_s_conv(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientMod-s without attention blocks; the published recipe has `drop_path_rate=0.02`."""
    sizes: dict[str, Any] = {
        "embed_dims": (40, 80, 160, 344),
        "depths": (4, 4, 12, 8),
        "attention_depths": (0, 0, 0, 0),
    }
    return _create("efficientmod_s_conv", pretrained, **(sizes | kwargs))
