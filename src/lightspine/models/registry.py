"""Model registry: maps a model name to its entry function and to the figures that its paper reports."""

import dataclasses
import difflib
import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch.nn as nn
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._pretrained import DefaultCfg

from lightspine.errors import UsageError

StateDict = dict[str, Any]
EntryPoint = Callable[..., nn.Module]
FilterFn = Callable[[StateDict, nn.Module], StateDict]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Results that the authors report for one variant; `None` where they report nothing.

    Attributes:
        top1: ImageNet-1k top-1 accuracy in percent, of the weights that `weights` names.
        macs_g: multiply-adds in 10^9 (the papers call them FLOPs) at the variant's default input size.
        weights: the entry of the official checkpoint that has this accuracy, "model" or "ema".
        note: remark on the training, such as distillation.
        source: table or file that reports the results.
    """

    top1: float | None = None
    macs_g: float | None = None
    weights: str = "model"
    note: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """Registry entry of one model.

    Attributes:
        name: registered name, such as `vmamba_tiny`.
        family: name of the module that defines the model, such as `vmamba`.
        create: entry function, `create(pretrained=False, **kwargs) -> nn.Module`.
        params: exact number of parameters with 3 input channels and 1000 classes.
        input_size: (channels, height, width) of the published evaluation.
        published: results that the authors report.
        checkpoint_filter_fn: maps a state dict of any known layout to the layout of this library.
        infer_kwargs: infers constructor arguments, such as the image size of a position table, from a state
            dict; the function of that name in the family's module, or `None`.
    """

    name: str
    family: str
    create: EntryPoint = field(repr=False)
    params: int
    input_size: tuple[int, int, int]
    published: Published
    checkpoint_filter_fn: FilterFn = field(repr=False)
    infer_kwargs: Callable[[StateDict], dict[str, Any]] | None = field(default=None, repr=False)


_RECORDS: dict[str, ModelRecord] = {}


def register_model(*, params: int, published: Published) -> Callable[[EntryPoint], EntryPoint]:
    """Register the decorated entry function under its own name.

    The function's module must define `default_cfgs` (timm's `generate_default_cfgs`) with an entry of that
    name, and `checkpoint_filter_fn`, both above the function. The model is registered in timm as well, unless
    timm has a model of the same name: timm's own models are never replaced.

    Args:
        params: exact number of parameters with 3 input channels and 1000 classes.
        published: results that the authors report.

    Raises:
        ValueError: the name is already registered.
    """

    def decorate(fn: EntryPoint) -> EntryPoint:
        name = fn.__name__
        if name in _RECORDS:
            raise ValueError(f"the model name {name!r} is already registered")
        module = sys.modules[fn.__module__]
        cfg: DefaultCfg = module.default_cfgs[name]
        _RECORDS[name] = ModelRecord(
            name=name,
            family=fn.__module__.rsplit(".", 1)[-1],
            create=fn,
            params=params,
            input_size=cfg.default.input_size,
            published=published,
            checkpoint_filter_fn=module.checkpoint_filter_fn,
            infer_kwargs=getattr(module, "infer_kwargs", None),
        )
        if not timm.is_model(name):
            timm.models.register_model(fn)
        return fn

    return decorate


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    default_indices: tuple[int, ...],
    **kwargs: Any,
) -> nn.Module:
    """Build a variant with timm's `build_model_with_cfg`; every entry function calls this.

    `features_only` and `pretrained_cfg_overlay` therefore work as they do in timm.

    Args:
        model_cls: model class of the family; its module defines `default_cfgs` and `checkpoint_filter_fn`.
        variant: registered name.
        pretrained: load the weights that `pretrained_cfg` or its overlay names.
        default_indices: default `out_indices` of `features_only`, indices into the model's `feature_info`.
        **kwargs: arguments of timm's builder and of the model.

    Raises:
        UsageError: `pretrained` without a source of weights; no weights are hosted for these models.
    """
    module = sys.modules[model_cls.__module__]
    # Passed explicitly, because timm's registry has its own cfg for the names that it also defines.
    cfg = kwargs.pop("pretrained_cfg", None) or module.default_cfgs[variant].default
    if isinstance(cfg, str):
        raise UsageError(f"{variant} has no weights with the tag {cfg!r}: pass a checkpoint file")
    if isinstance(cfg, dict):
        cfg = PretrainedCfg(**cfg)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if pretrained and not (
        any(overlay.get(k) for k in ("file", "url", "state_dict", "hf_hub_id")) or cfg.has_weights
    ):
        raise UsageError(
            f"no weights are hosted for {variant}: pass a checkpoint file, "
            f"lightspine.create_model({variant!r}, checkpoint=PATH)"
        )
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=dataclasses.replace(cfg, architecture=variant),
        pretrained_filter_fn=module.checkpoint_filter_fn,
        # timm's getter calls forward_intermediates; the hook-based wrappers would skip position tables and
        # padding, which belong to no submodule.
        feature_cfg={"out_indices": default_indices, "feature_cls": "getter"},
        **kwargs,
    )


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the models of this library that match a shell pattern, grouped by family."""
    return [name for name in _RECORDS if fnmatch.fnmatch(name, pattern)]


def find_record(name: str) -> ModelRecord | None:
    """Return the registry entry of a model, or `None` when this library has no model of that name."""
    return _RECORDS.get(name)


def get_record(name: str) -> ModelRecord:
    """Return the registry entry of a model.

    Raises:
        UsageError: this library has no model of that name; the message suggests similar names.
    """
    record = _RECORDS.get(name)
    if record is None:
        raise unknown_model(name)
    return record


def unknown_model(name: str) -> UsageError:
    """Return the error for a name that neither lightspine nor timm knows; it suggests similar names."""
    suggestions = difflib.get_close_matches(name, _RECORDS, n=4, cutoff=0.6)
    # timm has over a thousand names: search them only when no name of this library is similar.
    suggestions = suggestions or difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.6)
    hint = f"; the closest names are {', '.join(suggestions)}" if suggestions else ""
    return UsageError(f"unknown model {name!r}{hint} (see `lightspine list`)")
