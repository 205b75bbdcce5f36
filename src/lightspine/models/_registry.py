"""The registry of our models: name -> how to build it and what its paper published about it."""

import difflib
import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch.nn as nn
from timm.models._pretrained import DefaultCfg

from lightspine.errors import UsageError

StateDict = dict[str, Any]
EntryPoint = Callable[..., nn.Module]
FilterFn = Callable[[StateDict, nn.Module], StateDict]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the authors print about one variant; `None` where they print nothing.

    Attributes:
        top1: ImageNet-1k top-1 accuracy in percent, of the weights that `weights` names.
        macs_g: multiply-adds in 10^9 (the papers call them FLOPs) at the variant's own input size.
        weights: which entry of the official checkpoint has that score, "model" or "ema".
        note: what the number stands for where it is not plain ImageNet training.
        source: the table or file that prints the numbers.
    """

    top1: float | None = None
    macs_g: float | None = None
    weights: str = "model"
    note: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """One registered model.

    Attributes:
        name: registered name, such as `vmamba_tiny`.
        family: name of the module that defines it, such as `vmamba`.
        create: the entry function, `create(pretrained=False, **kwargs) -> nn.Module`.
        params: exact number of parameters with 3 input channels and 1000 classes.
        input_size: (channels, height, width) of the published evaluation.
        published: the authors' numbers.
        checkpoint_filter_fn: maps the published checkpoint layout to ours.
        infer_kwargs: reads creation arguments that the tensors tell (such as the size of a position table)
            off a state dict; the module's function of that name, if it has one.
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
    """Decorate an entry function of a family's module; the function's name becomes the model's name.

    The module must define `default_cfgs` (timm's `generate_default_cfgs`) with an entry of that name, and
    `checkpoint_filter_fn`, both above the entry function. The model is also registered in timm unless timm
    has a model of that name: timm's own models are never replaced.

    Raises:
        ValueError: the name is already registered here.
    """

    def decorate(fn: EntryPoint) -> EntryPoint:
        name = fn.__name__
        if name in _RECORDS:
            raise ValueError(f"the model name {name!r} is registered twice")
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


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of our models that match a shell pattern, sorted by family and then as registered."""
    return [name for name in _RECORDS if fnmatch.fnmatch(name, pattern)]


def find_record(name: str) -> ModelRecord | None:
    """Return the record of one of our models, or `None` when the name is not ours."""
    return _RECORDS.get(name)


def get_record(name: str) -> ModelRecord:
    """Return the record of one of our models.

    Raises:
        UsageError: no model of ours has this name; the closest names are given.
    """
    record = _RECORDS.get(name)
    if record is None:
        raise unknown_model(name)
    return record


def unknown_model(name: str) -> UsageError:
    """Return the error for a name that neither lightspine nor timm knows, with the closest names."""
    ours = difflib.get_close_matches(name, _RECORDS, n=4, cutoff=0.6)
    # timm has over a thousand names: ask it only when ours has nothing like it.
    close = ours or difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.6)
    hint = f"; the closest names are {', '.join(close)}" if close else ""
    return UsageError(f"unknown model {name!r}{hint} (see `lightspine list`)")
