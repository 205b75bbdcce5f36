"""SHViT: vision transformer with single-head attention on part of the channels and a stride-16 stem.

Paper: "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", Yun and Ro, CVPR 2024,
arXiv:2401.16456. Official code: https://github.com/ysj9909/SHViT (MIT).

Differences from the official code: on a CPU, feature maps are in `torch.channels_last` format; stochastic
depth, which the official code defines but never uses, works.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SqueezeExcite, trunc_normal_
from timm.models import PretrainedCfg, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.layers.arguments import (
    check_batch_statistics,
    check_choice,
    check_global_pool,
    check_images,
    stem_strides,
)
from lightspine.layers.attention import attention
from lightspine.layers.blocks import ConvNorm, Stage
from lightspine.models.registry import Published, StateDict, build_model, register_model
from lightspine.ops.memory_format import channels_last

__all__ = ["SHSA", "SHViT", "SHViTBlock"]


class FeedForward(nn.Module):
    """Two 1x1 convolutions with BatchNorm and a ReLU between; the last BatchNorm weight starts at zero."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden_dim)
        self.act = nn.ReLU(inplace=True)
        self.pw2 = ConvNorm(hidden_dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return self.pw2(self.act(self.pw1(x)))


class SHSA(nn.Module):
    """Single-head self-attention over the first `partial_dim` channels of a map (section 3.2).

    The attended and the remaining channels are concatenated and, after a ReLU, mixed by a projection. The
    BatchNorm weight of the projection starts at zero, so that a new residual branch adds nothing.

    Args:
        dim: channels of the map.
        partial_dim: channels with attention; by default 3/14 of `dim`, rounded down, the ratio of the paper.
        qk_dim: width of the queries and keys.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W.

    Raises:
        UsageError: `partial_dim` is not in 1..`dim`, or `qk_dim` is not positive.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import SHSA
        >>> attention = SHSA(dim=64, partial_dim=16)
        >>> attention(torch.randn(2, 64, 7, 5)).shape
        torch.Size([2, 64, 7, 5])
    """

    def __init__(self, dim: int, partial_dim: int | None = None, qk_dim: int = 16):
        super().__init__()
        if partial_dim is None:
            partial_dim = max(1, dim * 3 // 14)
        if not 1 <= partial_dim <= dim:
            raise UsageError(f"partial_dim must be between 1 and dim={dim}, got {partial_dim}")
        if qk_dim < 1:
            raise UsageError(f"qk_dim must be at least 1, got {qk_dim}")
        self.dim = dim
        self.partial_dim = partial_dim
        self.qk_dim = qk_dim
        self.norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvNorm(partial_dim, 2 * qk_dim + partial_dim)
        self.act = nn.ReLU(inplace=True)
        self.proj = ConvNorm(dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        B, _, H, W = x.shape
        x1, x2 = torch.split(x, [self.partial_dim, self.dim - self.partial_dim], dim=1)
        # Not flatten(2).transpose(1, 2): for one image, its backward gives strides with which PyTorch's
        # BatchNorm computes wrong gradients on a CPU.
        tokens = self.qkv(self.norm(x1)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, 2 qk_dim + partial_dim)
        q, k, v = torch.split(tokens, [self.qk_dim, self.qk_dim, self.partial_dim], dim=2)
        attended = attention(q, k, v)
        attended = attended.transpose(1, 2).reshape(B, self.partial_dim, H, W)
        return self.proj(self.act(torch.cat([attended, x2], dim=1)))


class SHViTBlock(nn.Module):
    """SHViT block: depthwise 3x3 convolution, single-head attention and feed-forward, each residual.

    The last BatchNorm weight of each branch starts at zero, as published: a new block is the identity.

    Args:
        dim: channels of the map.
        partial_dim: channels with attention; by default 3/14 of `dim`, the ratio of the paper.
        qk_dim: width of the queries and keys.
        attention: use attention; the first stage of the paper's models has none.
        ffn_ratio: hidden width of the feed-forward, as a multiple of `dim`.
        drop_path: probability of dropping a branch, per sample, in training.
        conv_norm_init: initial BatchNorm weight of the depthwise convolution.

    Shape:
        Input and output `(B, dim, H, W)`, any H and W.

    Raises:
        UsageError: as `SHSA`, or `partial_dim` without attention.

    Examples:
        >>> import torch
        >>> from lightspine.blocks import SHViTBlock
        >>> block = SHViTBlock(dim=64)
        >>> block(torch.randn(2, 64, 14, 9)).shape
        torch.Size([2, 64, 14, 9])
    """

    def __init__(
        self,
        dim: int,
        partial_dim: int | None = None,
        qk_dim: int = 16,
        *,
        attention: bool = True,
        ffn_ratio: float = 2.0,
        drop_path: float = 0.0,
        conv_norm_init: float = 0.0,
    ):
        super().__init__()
        if partial_dim is not None and not attention:
            raise UsageError(f"a block without attention takes no partial_dim, got {partial_dim}")
        self.dwconv = ConvNorm(dim, dim, 3, groups=dim, norm_init=conv_norm_init)
        self.attn = SHSA(dim, partial_dim, qk_dim) if attention else None
        self.ffn = FeedForward(dim, int(dim * ffn_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = x + self.drop_path(self.dwconv(x))
        if self.attn is not None:
            x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.ffn(x))


class PatchMerging(nn.Module):
    """Downsampling: 1x1 expansion by 4, depthwise 3x3 convolution of stride 2, squeeze-excite, projection."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        hidden_dim = 4 * dim
        self.conv1 = ConvNorm(dim, hidden_dim)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = ConvNorm(hidden_dim, hidden_dim, 3, stride=2, groups=hidden_dim)
        self.act2 = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(hidden_dim, 0.25)
        self.conv3 = ConvNorm(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        return self.conv3(self.se(x))


class Downsample(nn.Module):
    """Patch merging between two blocks without attention, one before and one after it (section 3.3).

    The BatchNorm weights of the depthwise branches start at one here, as published.
    """

    def __init__(self, dim: int, out_dim: int, ffn_ratio: float = 2.0):
        super().__init__()
        self.pre = SHViTBlock(dim, attention=False, ffn_ratio=ffn_ratio, conv_norm_init=1.0)
        self.merge = PatchMerging(dim, out_dim)
        self.post = SHViTBlock(out_dim, attention=False, ffn_ratio=ffn_ratio, conv_norm_init=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        return self.post(self.merge(self.pre(x)))


# torch.fx cannot trace a branch on the device, so it records the call.
@torch.fx.wrap
def _channels_last_on_cpu(x: Tensor) -> Tensor:
    """Convert to `torch.channels_last` on a CPU, where convolutions are faster in that format."""
    return channels_last(x) if x.device.type == "cpu" else x


class Classifier(nn.Module):
    """BatchNorm of the pooled features and a linear layer."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.fc = nn.Linear(dim, num_classes)
        trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C) to (B, classes)."""
        return self.fc(self.norm(x))


class SHViT(nn.Module):
    """SHViT backbone and classifier.

    Args:
        in_chans: channels of the image.
        num_classes: number of classes; 0 for no classifier.
        global_pool: "avg", or "" for no pooling (with `num_classes=0` only).
        embed_dims: channels of each stage; the first must be a multiple of 8.
        depths: blocks of each stage.
        partial_dims: channels with attention in each stage; `None` for a stage without attention.
        stem_stride: 16 as published, or 1, 2, 4 or 8 for small images: the first convolutions of the stem
            then have stride 1. Weights keep their shapes, so published ones load. Use 4 for images of 32 px
            and 4 or 8 for 64 px; with 16 their last map has a single pixel.
        qk_dim: width of queries and keys.
        ffn_ratio: hidden width of the feed-forward branches, as a multiple of the stage's channels.
        distilled: add a second classifier for distillation; `forward` returns `(logits, logits_dist)` in
            training and their mean in evaluation.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth rate of the last block; it grows linearly from 0 at the first one.

    Shape:
        Input `(B, in_chans, H, W)` with H and W of at least 32. Stage i has stride `stem_stride * 2**i`.

    Raises:
        UsageError: lists of different lengths, an unknown `global_pool`, classes without pooling, or an
            unsupported first width or `stem_stride`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        partial_dims: Sequence[int | None] = (None, 48, 68),
        stem_stride: int = 16,
        qk_dim: int = 16,
        ffn_ratio: float = 2.0,
        distilled: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(embed_dims) == len(depths) == len(partial_dims):
            raise UsageError(
                "embed_dims, depths and partial_dims must be equally long, "
                f"got lengths {len(embed_dims)}, {len(depths)} and {len(partial_dims)}"
            )
        if embed_dims[0] % 8:
            raise UsageError(f"the first of embed_dims must be a multiple of 8, got {embed_dims[0]}")
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.distilled = distilled
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = embed_dims[-1]

        widths = [in_chans, *(embed_dims[0] // k for k in (8, 4, 2, 1))]
        layers: list[nn.Module] = []
        for sides, stride in zip(itertools.pairwise(widths), stem_strides(stem_stride, 4), strict=True):
            layers += [ConvNorm(*sides, 3, stride=stride), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers[:-1])

        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depths))])
        stages = []
        self.feature_info = []
        width = embed_dims[0]
        for i, (dim, depth, partial_dim) in enumerate(zip(embed_dims, depths, partial_dims, strict=True)):
            attention = partial_dim is not None
            blocks = [
                SHViTBlock(
                    dim, partial_dim, qk_dim, attention=attention, ffn_ratio=ffn_ratio, drop_path=next(rates)
                )
                for _ in range(depth)
            ]
            stages.append(Stage(Downsample(width, dim, ffn_ratio) if i else nn.Identity(), blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            )
            width = dim
        self.stages = nn.ModuleList(stages)
        self.reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return no names: timm's rule for 1-d parameters and biases gives the published groups."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer-wise learning rates."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing of the blocks."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """Return the linear classifier, or both for a distilled model."""
        heads = [head.fc if isinstance(head, Classifier) else head for head in (self.head, self.head_dist)]
        return (heads[0], heads[1]) if self.distilled else heads[0]

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
        dim = self.head_hidden_size
        self.head = Classifier(dim, num_classes) if num_classes else nn.Identity()
        self.head_dist = Classifier(dim, num_classes) if num_classes and self.distilled else nn.Identity()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages and head that the given intermediates do not need; return their indices."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or prune_norm or shortened:
            self.reset_classifier(0, "")
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
        """Return the feature maps of selected stages, with the last map unless `intermediates_only`.

        Args:
            x: images (B, in_chans, H, W).
            indices: number of last stages, list of stage indices, or `None` for all.
            norm: no effect, as SHViT has no final norm.
            stop_early: stop after the last selected stage.
            output_fmt: "NCHW".
            intermediates_only: return only the list of maps.

        Raises:
            UsageError: another `output_fmt`.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        del norm
        take_indices, last = feature_take_indices(len(self.stages), indices)
        x = self._embed(x)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def _embed(self, x: Tensor) -> Tensor:
        check_images(x)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_batch_statistics(self, x)
        return self.stem(_channels_last_on_cpu(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the last map (B, num_features, ceil(H / S), ceil(W / S)).

        The stride S is `feature_info[-1]["reduction"]`, 64 as published.
        """
        x = self._embed(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def _pool(self, x: Tensor) -> Tensor:
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        return F.dropout(x, self.drop_rate, self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map the last map to logits, or to pooled features (B, head_hidden_size) with `pre_logits`."""
        x = self._pool(x)
        if pre_logits:
            return x
        if not self.distilled or self.num_classes == 0:
            return self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.training and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (B, in_chans, H, W) to logits; a distilled model in training returns two."""
        return self.forward_head(self.forward_features(x))


_REPOSITORY = "https://github.com/ysj9909/SHViT"


def _cfg(size: int, *, file: str = "", distilled: bool = False) -> PretrainedCfg:
    # timm declares one name here, and takes several.
    classifier: Any = ("head.fc", "head_dist.fc") if distilled else "head.fc"
    return PretrainedCfg(
        url=f"{_REPOSITORY}/releases/download/v1.0/{file}" if file else None,
        input_size=(3, size, size),
        min_input_size=(3, 32, 32),
        pool_size=(4, 4),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_classes=1000,
        first_conv="stem.0.conv",
        classifier=classifier,
        license="mit",
        paper_ids="arXiv:2401.16456",
        paper_name="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        origin_url=f"{_REPOSITORY}/releases",
    )


_SIZES = {"s1": 224, "s2": 224, "s3": 224, "s4": 256}
default_cfgs = generate_default_cfgs(
    {
        **{f"shvit_{name}.in1k": _cfg(size, file=f"shvit_{name}.pth") for name, size in _SIZES.items()},
        **{f"shvit_{name}_dist": _cfg(size, distilled=True) for name, size in _SIZES.items()},
    }
)

_MERGING_PARTS = ("pre.0", "pre.1", "merge", "post.0", "post.1")
_SHARED_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^patch_embed\.", "stem."),
        (r"\.(pre|post)\.0\.m\.", r".\1.dwconv."),
        (r"\.(pre|post)\.1\.m\.", r".\1.ffn."),
        (r"\.conv\.m\.", ".dwconv."),
        (r"\.mixer\.m\.", ".attn."),
        (r"\.ffn\.m\.", ".ffn."),
        (r"\.pre_norm\.", ".norm."),
        (r"\.proj\.1\.", ".proj."),
        (r"\.c\.", ".conv."),
        (r"\.bn\.", ".norm."),
        (r"^(head|head_dist)\.l\.", r"\1.fc."),
    )
]


def _rename(key: str) -> str:
    """Convert an official or timm key; keys of this module stay unchanged."""
    if official := re.match(r"blocks(\d)\.(\d+)\.(.+)", key):
        stage, index, rest = int(official[1]) - 1, int(official[2]), official[3]
        # From the second stage on, the first three official entries are the downsampling.
        if stage > 0 and index < 3:
            key = f"stages.{stage}.downsample.{('pre', 'merge', 'post')[index]}.{rest}"
        else:
            key = f"stages.{stage}.blocks.{index - 3 if stage else index}.{rest}"
    elif timm_key := re.match(r"(stages\.\d+\.downsample)\.(\d)\.(.+)", key):
        key = f"{timm_key[1]}.{_MERGING_PARTS[int(timm_key[2])]}.{timm_key[3]}"
    for pattern, replacement in _SHARED_RULES:
        key = pattern.sub(replacement, key)
    return key


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Convert an official, timm or lightspine state dict to the names of this module.

    Heads that the model does not have are dropped: the second one of a model that is not distilled, both of
    a model without classes.
    """
    renamed = {_rename(key): value for key, value in state_dict.items()}
    absent = tuple(
        f"{name}." for name in ("head", "head_dist") if isinstance(getattr(model, name), nn.Identity)
    )
    return {key: value for key, value in renamed.items() if not key.startswith(absent)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model(SHViT, variant, pretrained, default_indices=(0, 1, 2), **kwargs)


_S1: dict[str, Any] = {"embed_dims": (128, 224, 320), "depths": (2, 4, 5), "partial_dims": (None, 48, 68)}
_S2: dict[str, Any] = {"embed_dims": (128, 308, 448), "depths": (2, 4, 5), "partial_dims": (None, 66, 96)}
_S3: dict[str, Any] = {"embed_dims": (192, 352, 448), "depths": (3, 5, 5), "partial_dims": (None, 75, 96)}
_S4: dict[str, Any] = {"embed_dims": (224, 336, 448), "depths": (4, 7, 6), "partial_dims": (None, 72, 96)}


def _published(top1: float, macs_g: float, *, distilled: bool = False) -> Published:
    return Published(
        top1=top1,
        macs_g=macs_g,
        note="distilled with regnety_160" if distilled else "",
        source="paper, table of distilled models" if distilled else "README of the official code",
    )


@register_model(params=6_330_808, published=_published(72.8, 0.241))
def shvit_s1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S1 at 224 px."""
    return _create("shvit_s1", pretrained, **(_S1 | kwargs))


@register_model(params=6_652_448, published=_published(74.0, 0.241, distilled=True))
def shvit_s1_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S1 at 224 px with the second head of a distilled model."""
    return _create("shvit_s1_dist", pretrained, **(_S1 | {"distilled": True} | kwargs))


@register_model(params=11_483_072, published=_published(75.2, 0.366))
def shvit_s2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S2 at 224 px."""
    return _create("shvit_s2", pretrained, **(_S2 | kwargs))


@register_model(params=11_932_968, published=_published(76.2, 0.366, distilled=True))
def shvit_s2_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S2 at 224 px with the second head of a distilled model."""
    return _create("shvit_s2_dist", pretrained, **(_S2 | {"distilled": True} | kwargs))


@register_model(params=14_245_273, published=_published(77.4, 0.601))
def shvit_s3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S3 at 224 px."""
    return _create("shvit_s3", pretrained, **(_S3 | kwargs))


@register_model(params=14_695_169, published=_published(78.3, 0.601, distilled=True))
def shvit_s3_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S3 at 224 px with the second head of a distilled model."""
    return _create("shvit_s3_dist", pretrained, **(_S3 | {"distilled": True} | kwargs))


@register_model(params=16_588_484, published=_published(79.4, 0.986))
def shvit_s4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S4 at 256 px."""
    return _create("shvit_s4", pretrained, **(_S4 | kwargs))


@register_model(params=17_038_380, published=_published(80.2, 0.986, distilled=True))
def shvit_s4_dist(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S4 at 256 px with the second head of a distilled model."""
    return _create("shvit_s4_dist", pretrained, **(_S4 | {"distilled": True} | kwargs))
