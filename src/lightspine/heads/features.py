"""Feature extraction backbone for dense tasks: maps of a `features_only` model, with norms and freezing."""

from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightspine.errors import UsageError

MapNorm = Literal["none", "layer"]


class FeatureBackbone(nn.Module):
    """Feature maps of any model created with `features_only=True`, from lightspine or timm.

    Published dense-task settings: VMamba `norm="layer"` (its `outnorm{i}`); EfficientViM `norm="layer"` (the
    first step of its pyramid) and `freeze_batch_norm=True`; SHViT `freeze_batch_norm=True`; EfficientMod and
    Vim the defaults. Later stages always receive the map before its norm.

    Args:
        model: a `features_only` model; a checkpoint is loaded when it is created
            (`lightspine.create_model(name, features_only=True, checkpoint=FILE)`), see `load_report`.
        norm: "layer" adds a LayerNorm over the channels of each map; classifier checkpoints have no weights
            for it.
        frozen_stages: 0 freezes the stem, k the stem and the first k stages (blocks of a plain model): no
            gradients, and modules in evaluation mode. `None` freezes nothing.
        freeze_batch_norm: keep every BatchNorm of the model in evaluation mode; weight and bias are still
            trained.

    Shape:
        Input `(B, in_chans, H, W)`; output one map `(B, C, H / stride, W / stride)` for each of `channels`
        and `strides`, finest first, rounded as the model does.

    Raises:
        UsageError: not a `features_only` model, more frozen stages than the model has, or a model without
            `group_matcher`.

    Examples:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1", features_only=True)
        >>> backbone = FeatureBackbone(model, freeze_batch_norm=True)
        >>> [tuple(x.shape[1:]) for x in backbone(torch.zeros(2, 3, 97, 161))]
        [(128, 7, 11), (224, 4, 6), (320, 2, 3)]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: MapNorm = "none",
        frozen_stages: int | None = None,
        freeze_batch_norm: bool = False,
    ):
        super().__init__()
        info: Any = getattr(model, "feature_info", None)
        if not hasattr(info, "reduction"):
            raise UsageError(
                f"expected a model created with features_only=True, got a {type(model).__name__}"
            )
        if norm not in ("none", "layer"):
            raise UsageError(f"norm must be 'none' or 'layer', got {norm!r}")
        self.model = model
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.strides: tuple[int, ...] = tuple(info.reduction())
        self.freeze_batch_norm = freeze_batch_norm
        self._kept = tuple(range(len(self.channels)))
        self.norms = nn.ModuleList(
            # 1e-5 as in the official code of VMamba and EfficientViM; timm's default is 1e-6.
            LayerNorm2d(width, eps=1e-5) if norm == "layer" else nn.Identity()
            for width in self.channels
        )
        if frozen_stages is not None:
            _freeze(model, frozen_stages)
        self.train(self.training)

    @property
    def is_plain(self) -> bool:
        """Whether all maps have the same stride, as in Vim and ViTs."""
        return len(set(self.strides)) == 1

    @property
    def load_report(self) -> Any:
        """`LoadReport` of the checkpoint, or `None` without a checkpoint."""
        return getattr(self.model, "load_report", None)

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Channel means of the model's training images; ImageNet's if the model does not define them."""
        return self._pixel_statistics("mean", IMAGENET_DEFAULT_MEAN)

    @property
    def image_std(self) -> tuple[float, ...]:
        """Channel standard deviations, see `image_mean`."""
        return self._pixel_statistics("std", IMAGENET_DEFAULT_STD)

    def _pixel_statistics(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        inner: Any = getattr(self.model, "model", self.model)
        cfg = getattr(inner, "pretrained_cfg", None) or getattr(inner, "default_cfg", None) or {}
        values = cfg.get(key) if isinstance(cfg, dict) else getattr(cfg, key, None)
        return tuple(values or default)

    def keep_maps(self, indices: Sequence[int]) -> None:
        """Keep only the maps with these indices, and their norms."""
        self.norms = nn.ModuleList(self.norms[i] for i in indices)
        self.channels = tuple(self.channels[i] for i in indices)
        self.strides = tuple(self.strides[i] for i in indices)
        self._kept = tuple(self._kept[i] for i in indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of images (B, in_chans, H, W)."""
        maps = self.model(x)
        return [norm(maps[i]) for norm, i in zip(self.norms, self._kept, strict=True)]

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, except for frozen modules."""
        super().train(mode)
        if not mode:
            return self
        for module in self.model.modules():
            parameters = list(module.parameters())
            frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
            if frozen or (self.freeze_batch_norm and isinstance(module, _BatchNorm)):
                module.eval()
        return self


def _freeze(model: nn.Module, stages: int) -> None:
    """Freeze the stem and the first stages, found with the model's `group_matcher`."""
    inner: Any = getattr(model, "model", model)
    matcher = getattr(inner, "group_matcher", None)
    if matcher is None:
        raise UsageError(
            f"frozen_stages needs a model with a group_matcher, got a {type(model).__name__}: "
            f"create it with feature_cls='getter'"
        )
    groups = cast(dict[int, list[str]], group_parameters(inner, matcher(coarse=True)))
    ordered = [groups[layer] for layer in sorted(groups)]
    if not 0 <= stages < len(ordered):
        raise UsageError(f"frozen_stages must be 0 to {len(ordered) - 1}, got {stages}")
    for names in ordered[: stages + 1]:
        for name in names:
            inner.get_parameter(name).requires_grad_(False)
