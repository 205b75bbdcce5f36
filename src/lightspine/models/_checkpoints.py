"""Load a checkpoint of any known layout into a model: strictly, and with a report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.models import adapt_input_conv
from torch import Tensor

from lightspine.errors import LightspineError
from lightspine.models._identify import identify_tensors
from lightspine.models._reading import EMA_ENTRIES, CheckpointFile, Weights, read_checkpoint
from lightspine.models._registry import find_record
from lightspine.models._report import LoadReport

FilterFn = Callable[[dict[str, Any], nn.Module], dict[str, Any]]


def load_checkpoint(
    model: nn.Module,
    source: str | Path | dict[str, Any],
    *,
    weights: Weights = "auto",
    drop_head: bool | None = None,
) -> LoadReport:
    """Load an official, timm or lightspine checkpoint into a model in place.

    Args:
        model: a model of ours, or any timm model (whose own layout is then expected).
        source: file (.pth, .ckpt, .safetensors), or a state dict, bare or inside `model`, `model_ema`,
            `state_dict` or `state_dict_ema`.
        weights: "model", "ema", or "auto" for the entry whose score is published.
        drop_head: leave out a classifier of another size. By default only when the model's `num_classes` is
            not the published one, that is, when another head was asked for.

    Returns:
        What was loaded, converted, dropped and left at its initial value.

    Raises:
        UsageError: no such file, or no such entry in it.
        LightspineError: the file cannot be read, or it is of another family or variant; the model is then
            unchanged.
    """
    file = read_checkpoint(source)
    return load_checkpoint_file(model, file, weights=weights, drop_head=drop_head)


def load_checkpoint_file(
    model: nn.Module, file: CheckpointFile, *, weights: Weights = "auto", drop_head: bool | None = None
) -> LoadReport:
    """Do as `load_checkpoint`, from a file that was read before."""
    name = getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)
    record = find_record(name) if type(model).__module__.startswith("lightspine.") else None
    entry = file.select(weights, record.published.weights if record else "model")
    found = file.entries[entry]
    report = LoadReport(source=file.label, entry=entry, is_ema=entry in EMA_ENTRIES)

    filter_fn: FilterFn = record.checkpoint_filter_fn if record else _same_layout
    fitted = dict(filter_fn(dict(found), model))
    _note_conversions(report, found, fitted, filter_fn, model)
    _adapt_input(report, fitted, model)
    _drop_head(report, fitted, model, drop_head)
    _compare(report, fitted, model)
    left_out = set(_head_tensors(model)) if report.dropped_head else set()
    if not report.complete or not left_out.issuperset(report.missing):
        raise LightspineError(_refusal(report, name, model, found))
    model.load_state_dict(fitted, strict=False)
    report.loaded = [key for key in model.state_dict() if key in fitted]
    return report


def _same_layout(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    del model
    return state_dict


def _note_conversions(
    report: LoadReport,
    found: dict[str, Tensor],
    fitted: dict[str, Tensor],
    filter_fn: FilterFn,
    model: nn.Module,
) -> None:
    """Find out what the filter did: it only moves tensors, so each can be followed through its storage."""
    origins: dict[int, str] = {t.untyped_storage().data_ptr(): key for key, t in found.items() if t.numel()}
    used = {key for key in fitted if key in found and found[key] is fitted[key]}
    for key, tensor in fitted.items():
        origin = origins.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if key in used:
            continue
        if origin is None:
            report.converted[key] = "computed"
            continue
        used.add(origin)
        if origin != key:
            report.converted[key] = f"renamed from {origin}"
        elif tensor.shape != found[origin].shape:
            report.converted[key] = "reshaped"
    for key in found.keys() - used:
        # Not followed through its storage: it was used if the outcome differs without it.
        without = filter_fn({k: v for k, v in found.items() if k != key}, model)
        if without.keys() == fitted.keys():
            report.dropped.append(key)
    report.dropped.sort(key=list(found).index)


def _adapt_input(report: LoadReport, fitted: dict[str, Tensor], model: nn.Module) -> None:
    first = getattr(model, "default_cfg", {}).get("first_conv")
    names = (first,) if isinstance(first, str) else tuple(first or ())
    for name in names:
        key = f"{name}.weight"
        module = dict(model.named_modules()).get(name)
        if key not in fitted or not isinstance(module, nn.Conv2d):
            continue
        received, expected = fitted[key].shape[1], module.weight.shape[1]
        if received == 3 and expected != 3:
            fitted[key] = adapt_input_conv(expected, fitted[key])
            report.converted[key] = f"adapted from 3 to {expected} input channels"


def _head_tensors(model: nn.Module) -> list[str]:
    names = getattr(model, "default_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


def _drop_head(
    report: LoadReport, fitted: dict[str, Tensor], model: nn.Module, drop_head: bool | None
) -> None:
    if drop_head is None:
        published = getattr(model, "default_cfg", {}).get("num_classes")
        drop_head = getattr(model, "num_classes", published) != published
    if not drop_head:
        return
    expected = model.state_dict()
    for key in _head_tensors(model):
        if key in fitted and (key not in expected or expected[key].shape != fitted[key].shape):
            del fitted[key]
            report.dropped.append(key)
            report.dropped_head = True
            report.converted.pop(key, None)


def _compare(report: LoadReport, fitted: dict[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    report.missing = [key for key in expected if key not in fitted]
    report.unexpected = [key for key in fitted if key not in expected]
    report.mismatched = {
        key: (tuple(tensor.shape), tuple(expected[key].shape))
        for key, tensor in fitted.items()
        if key in expected and tensor.shape != expected[key].shape
    }


def _refusal(report: LoadReport, name: str, model: nn.Module, found: dict[str, Tensor]) -> str:
    heads = set(_head_tensors(model))
    if report.mismatched and not (report.mismatched.keys() - heads or report.missing or report.unexpected):
        (received, *_), (expected, *_) = next(iter(report.mismatched.values()))
        return (
            f"{report.source} has a head of {received} classes and the model one of {expected}: "
            f"pass num_classes={received} to keep it, or drop_head=True to leave it out"
        )
    guess = identify_tensors(found)
    what = f"is a checkpoint of {guess}" if guess and guess.name != name else "does not fit"
    return f"{report.source} {what}, expected {name}: {report.mismatches()}"
