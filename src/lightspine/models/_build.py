"""The one way in which the entry functions of all families build a model."""

import dataclasses
import sys
from typing import Any

import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg

from lightspine.errors import UsageError


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    default_indices: tuple[int, ...],
    **kwargs: Any,
) -> nn.Module:
    """Build a variant through timm, so that `features_only` and `pretrained_cfg_overlay` work as in timm.

    Args:
        model_cls: the family's model class; its module holds `default_cfgs` and `checkpoint_filter_fn`.
        variant: registered name.
        pretrained: load the weights that `pretrained_cfg` or its overlay names.
        default_indices: indices into the model's `feature_info` that `features_only` returns when no
            `out_indices` are asked for.
        **kwargs: timm's building arguments and the model's own; the model rejects what it does not know.

    Raises:
        UsageError: `pretrained` without a source of weights: no weights are hosted for these models.
    """
    module = sys.modules[model_cls.__module__]
    # Given explicitly, because timm's own registry holds another cfg for the names that timm has too.
    cfg = kwargs.pop("pretrained_cfg", None) or module.default_cfgs[variant].default
    if isinstance(cfg, str):
        raise UsageError(f"{variant} has no weights by the tag {cfg!r}: give a checkpoint file")
    if isinstance(cfg, dict):
        cfg = PretrainedCfg(**cfg)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if pretrained and not (
        any(overlay.get(k) for k in ("file", "url", "state_dict", "hf_hub_id")) or cfg.has_weights
    ):
        raise UsageError(
            f"no weights are hosted for {variant}: give a checkpoint file, "
            f"lightspine.create_model({variant!r}, checkpoint=PATH)"
        )
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=dataclasses.replace(cfg, architecture=variant),
        pretrained_filter_fn=module.checkpoint_filter_fn,
        # The getter calls forward_intermediates, so a position table or a padded map is never skipped.
        feature_cfg={"out_indices": default_indices, "feature_cls": "getter"},
        **kwargs,
    )
