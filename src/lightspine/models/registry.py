"""Model registry: maps a model name to its entry function and to the figures that its paper reports."""

import dataclasses
import difflib
import fnmatch
import functools
import inspect
import os
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
# Names in timm's registry of the models whose own name is that of a model of timm.
_NAMES_IN_TIMM: dict[str, str] = {}


def register_model(*, params: int, published: Published) -> Callable[[EntryPoint], EntryPoint]:
    """Register the decorated entry function under its own name.

    The function's module must define `default_cfgs` (timm's `generate_default_cfgs`) with an entry of that
    name, and `checkpoint_filter_fn`, both above the function. The model is registered in timm as well, with
    the prefix `lightspine_` if timm has a model of the same name: timm's own models are never replaced.

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
        if timm.is_model(name):
            _NAMES_IN_TIMM[name] = f"lightspine_{name}"
            timm.models.register_model(_renamed(fn, _NAMES_IN_TIMM[name]))
        else:
            timm.models.register_model(fn)
        return fn

    return decorate


def _renamed(fn: EntryPoint, name: str) -> EntryPoint:
    """Return an entry function of another name, which its module then has, too."""

    @functools.wraps(fn)
    def entry(*args: Any, **kwargs: Any) -> nn.Module:
        return fn(*args, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    setattr(sys.modules[fn.__module__], name, entry)
    return entry


def own_name(name: str) -> str:
    """Return the registered name of a model by its name in timm's registry; other names unchanged.

    Args:
        name: such as `lightspine_shvit_s1`, the model that timm cannot call `shvit_s1`.
    """
    return next((own for own, in_timm in _NAMES_IN_TIMM.items() if name == in_timm), name)


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

    With `pretrained`, the published checkpoint is downloaded at the first call, read safely and loaded
    strictly, like any checkpoint file. Sources that the caller passes by `pretrained_cfg_overlay` (`file`,
    `state_dict`) are loaded by timm.

    Raises:
        UsageError: `pretrained` for a variant whose authors offer no file that a program can download, or an
            unknown tag or argument.
        LightspineError: the download failed, or the file does not fit the model.
    """
    _check_arguments(model_cls, variant, kwargs)
    module = sys.modules[model_cls.__module__]
    cfg = _resolve_cfg(variant, kwargs.pop("pretrained_cfg", None), module.default_cfgs[variant])
    overlay = kwargs.get("pretrained_cfg_overlay") or {}

    def build(with_weights: bool, options: dict[str, Any]) -> nn.Module:
        timm_cfg: Any = cfg  # timm's annotation omits the class
        return build_model_with_cfg(
            model_cls,
            variant,
            with_weights,
            pretrained_cfg=timm_cfg,
            pretrained_filter_fn=module.checkpoint_filter_fn,
            # timm's getter calls forward_intermediates; the hook-based wrappers would skip position tables
            # and padding, which belong to no submodule.
            feature_cfg={"out_indices": default_indices, "feature_cls": "getter"},
            **options,
        )

    if not pretrained or any(overlay.get(key) for key in ("file", "state_dict")):
        return build(pretrained, kwargs)
    from lightspine.models.loading import load_published

    cfg = dataclasses.replace(cfg, **overlay)
    return load_published(variant, cfg, lambda options: build(False, options), kwargs)


def _resolve_cfg(variant: str, cfg: Any, published: DefaultCfg) -> PretrainedCfg:
    """Return the configuration that `pretrained_cfg` stands for: a tag, the values, or the default."""
    # Passed explicitly to timm, because its registry has its own cfg for the names that it also defines.
    if isinstance(cfg, str):
        if cfg not in published.cfgs:
            raise _unknown_tag(variant, cfg)
        cfg = dataclasses.replace(published.cfgs[cfg], tag=cfg)
    elif isinstance(cfg, dict):
        cfg = PretrainedCfg(**cfg)
    elif cfg is None:
        tag = next(iter(published.tags))
        cfg = dataclasses.replace(published.default, tag=tag)
    # timm saves the architecture in `config.json`, and builds the model of this name from it.
    return dataclasses.replace(cfg, architecture=_NAMES_IN_TIMM.get(variant, variant))


# Arguments of timm's builder.
_BUILDER_ARGUMENTS = frozenset(
    (
        "cache_dir",
        "feature_cls",
        "features_only",
        "kwargs_filter",
        "out_indices",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "pretrained_strict",
    )
)
# What to do instead of arguments that some models of timm have.
_INSTEAD = {
    "checkpoint_path": "pass checkpoint=PATH to lightspine.create_model",
    "dynamic_img_size": "it takes images of any size",
    "img_size": "it takes images of any size",
    "output_stride": "stem_stride gives finer maps",
}


def _check_arguments(model_cls: type[nn.Module], variant: str, arguments: dict[str, Any]) -> None:
    known = set(inspect.signature(model_cls).parameters)
    for name in arguments:
        if name not in known and name not in _BUILDER_ARGUMENTS:
            hint = _INSTEAD.get(name) or f"expected some of {', '.join(sorted(known))}"
            raise UsageError(f"{variant} has no argument {name!r}: {hint}")


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Return the names of the models of this library that match a shell pattern, grouped by family.

    Args:
        pattern: shell pattern, such as `vim_*`.
        pretrained: return only models whose published weights can be downloaded, with the tag of each set of
            weights, such as `vmamba_tiny.in1k`; the first one of a model is its default.

    Examples:
        >>> import lightspine
        >>> lightspine.list_models("efficientvim_m1", pretrained=True)
        ['efficientvim_m1.e300_in1k', 'efficientvim_m1.e450_in1k']
    """
    names = [name for name in _RECORDS if fnmatch.fnmatch(name, pattern)]
    if not pretrained:
        return names
    return [full_name for name in names for full_name in published_cfgs(name)]


def published_cfgs(name: str) -> dict[str, PretrainedCfg]:
    """Return timm's configuration of each set of published weights of a model, by name with tag."""
    published: DefaultCfg = sys.modules[get_record(name).create.__module__].default_cfgs[name]
    return {
        f"{name}.{tag}": dataclasses.replace(published.cfgs[tag], tag=tag)
        for tag in published.tags
        if published.cfgs[tag].has_weights
    }


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


TIMM_PREFIX = "timm/"
"""Prefix of a name that selects timm's model also where lightspine has a model of the same name."""


def timm_name(name: str) -> str | None:
    """Return the name in timm of a model that is not lightspine's, or `None` for a model of lightspine.

    Args:
        name: such as `resnet18`, `timm/resnet18`, `timm/shvit_s1`, or with the tag of its weights
            `shvit_s1.in1k`.

    Raises:
        UsageError: neither library has a model of that name, or the model has no weights of that tag; the
            message suggests similar names.
    """
    inner = name.removeprefix(TIMM_PREFIX)
    model, dot, tag = name.partition(".")
    if find_record(model) is not None:
        if dot and name not in published_cfgs(model):
            raise _unknown_tag(model, tag)
        return None
    if not timm.is_model(inner):
        raise unknown_model(inner)
    if timm.model_entrypoint(inner).__module__.startswith("lightspine"):
        raise UsageError(f"timm has no model {inner!r} of its own: use {inner} without {TIMM_PREFIX}")
    return inner


def _unknown_tag(model: str, tag: str) -> UsageError:
    expected = ", ".join(name.partition(".")[2] for name in published_cfgs(model)) or "no tag"
    return UsageError(f"{model} has no weights with the tag {tag!r}: expected {expected}")


def find_timm_cfg(name: str) -> PretrainedCfg | None:
    """Return timm's configuration of a model that is not lightspine's; `None` if there is none.

    Raises:
        UsageError: neither library has a model of that name.
    """
    inner = timm_name(name)
    return None if inner is None else timm.get_pretrained_cfg(inner)


def unknown_model(name: str) -> UsageError:
    """Return the error for a name that neither lightspine nor timm knows; it suggests similar names."""
    if os.path.isfile(name):
        return UsageError(f"expected the name of a model, received the file {name} (see `lightspine list`)")
    suggestions = difflib.get_close_matches(name, _RECORDS, n=4, cutoff=0.6)
    # timm has over a thousand names: search them only when no name of this library is similar.
    suggestions = suggestions or difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.6)
    hint = f"; the closest names are {', '.join(suggestions)}" if suggestions else ""
    return UsageError(f"unknown model {name!r}{hint} (see `lightspine list`)")
