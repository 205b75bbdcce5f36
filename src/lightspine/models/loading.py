"""Load a checkpoint of any known layout into a model: identification, strict loading, report."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import EMA_ENTRIES, CheckpointSource, Weights, read_checkpoint
from lightspine.models.dense_weights import DENSE_WEIGHTS
from lightspine.models.registry import find_record, get_record, list_models, own_name, published_cfgs
from lightspine.models.weights import TIMM_FILES, WeightsFile, fetch_weights

FilterFn = Callable[[dict[str, Any], nn.Module], dict[str, Any]]


@dataclass
class LoadReport:
    """Outcome of loading a checkpoint into a model, tensor by tensor.

    Attributes:
        source: file name, or "the state dict".
        entry: entry of the file that was loaded, "" for a bare state dict.
        is_ema: the entry is an exponential moving average.
        loaded: names in the model that received a tensor.
        converted: name in the model -> conversion that was applied (renamed, reshaped, resized, adapted).
        dropped: names in the file that the model does not use, or a classifier of another size.
        dropped_head: a classifier of another size is among the dropped tensors.
        missing: names in the model that kept their initial value.
        unexpected: names in the file that the model does not have (empty after a successful load).
        mismatched: name -> (shape in the file, shape in the model) (empty after a successful load).
        url: address that a published file was downloaded from, or "".
        sha256: SHA-256 of that file, or "".
    """

    source: str
    entry: str
    is_ema: bool
    loaded: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    dropped_head: bool = False
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    url: str = ""
    sha256: str = ""

    @property
    def complete(self) -> bool:
        """Whether every tensor that was not dropped has a place in the model."""
        return not (self.unexpected or self.mismatched)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "source": self.source,
            "url": self.url,
            "sha256": self.sha256,
            "entry": self.entry,
            "is_ema": self.is_ema,
            "loaded": len(self.loaded),
            "converted": self.converted,
            "dropped": self.dropped,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": {name: [list(shape) for shape in pair] for name, pair in self.mismatched.items()},
        }

    def __str__(self) -> str:
        """Summary in one line, for a log."""
        entry = f" from {self.entry!r}" if self.entry else ""
        parts = [
            f"loaded {len(self.loaded)} tensors{' (EMA)' if self.is_ema else ''}{entry} of {self.source}"
        ]
        if self.url:
            parts[0] += f" from {self.url} (SHA-256 {self.sha256})"
        for word, names in (
            ("converted", list(self.converted)),
            ("dropped", self.dropped),
            ("left at their initial value", self.missing),
        ):
            if names:
                first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                parts.append(f"{len(names)} {word} ({first})")
        return ", ".join(parts)

    def mismatches(self, limit: int = 3) -> str:
        """Return the first `limit` differences between checkpoint and model."""
        differences = [
            f"{name} is {_format_shape(found)} in the file and {_format_shape(expected)} in the model"
            for name, (found, expected) in self.mismatched.items()
        ]
        # In turn, because a renamed tensor is both.
        for missing, unexpected in itertools.zip_longest(self.missing, self.unexpected):
            differences += [f"{missing} is missing in the file"] if missing else []
            differences += [f"{unexpected} is not in the model"] if unexpected else []
        more = f" and {len(differences) - limit} more" if len(differences) > limit else ""
        return "; ".join(differences[:limit]) + more


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "a scalar"


def load_checkpoint(
    model: nn.Module,
    source: CheckpointSource,
    *,
    weights: Weights = "auto",
    drop_head: bool | None = None,
) -> LoadReport:
    """Load an official, timm or lightspine checkpoint into a model in place.

    Args:
        model: a model of this library, or any timm model (which takes files in timm's own layout only).
        source: file (.pth, .ckpt, .safetensors), an opened `Checkpoint`, or a state dict, bare or inside
            `model`, `model_ema`, `state_dict` or `state_dict_ema`.
        weights: "model", "ema", or "auto" for the entry with the published score.
        drop_head: leave out a classifier of another size. By default only when the model's `num_classes`
            differs from the published one.

    Returns:
        Which tensors were loaded, converted, dropped and left at their initial value.

    Raises:
        UsageError: the file or the entry does not exist.
        LightspineError: the file cannot be read, belongs to another family or variant, or holds NaN or
            infinity; the model is then unchanged.
    """
    checkpoint = read_checkpoint(source)
    name = own_name(getattr(model, "default_cfg", {}).get("architecture", type(model).__name__))
    record = find_record(name) if type(model).__module__.startswith("lightspine.") else None
    entry = checkpoint.select(weights, record.published.weights if record else "model")
    found = checkpoint.entries[entry]
    report = LoadReport(source=checkpoint.label, entry=entry, is_ema=entry in EMA_ENTRIES)

    filter_fn: FilterFn = record.checkpoint_filter_fn if record else _keep_layout
    with shape_errors(f"{checkpoint.label} does not fit {name}"):
        fitted = dict(filter_fn(dict(found), model))
    _record_conversions(report, found, fitted, filter_fn, model)
    _adapt_input_channels(report, fitted, model)
    _drop_mismatched_head(report, fitted, model, drop_head)
    report.dropped += checkpoint.left_out.get(entry, [])
    _record_mismatches(report, fitted, model.state_dict())
    left_out = set(_classifier_tensors(model)) if report.dropped_head else set()
    if not report.complete or not left_out.issuperset(report.missing):
        raise LightspineError(_mismatch_message(report, name, model, found))
    _check_finite(report, fitted, model)
    model.load_state_dict(fitted, strict=False)
    report.loaded = [key for key in model.state_dict() if key in fitted]
    return report


def frozen_without_weights(name: str) -> UsageError:
    """Return the error for a model whose frozen stages would keep random weights."""
    return UsageError(
        f"frozen stages of {name} would keep random weights: give a checkpoint, or set frozen_stages to null "
        "(None in Python) to train every layer"
    )


FEATURE_OPTIONS = ("features_only", "out_indices", "feature_cls")
"""Arguments of timm's feature extractors, which belong to the wrapper and not to the model."""


def load_published(
    name: str, cfg: PretrainedCfg, build: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]
) -> nn.Module:
    """Build a model with the weights that timm's pretrained configuration names.

    Args:
        name: registered name.
        cfg: the configuration: an address, a repository of the hub, or a local file or folder.
        build: builds the model without weights from its arguments.
        kwargs: arguments of the model and of timm's builder.

    Returns:
        The model; `model.load_report` describes what was loaded.

    Raises:
        UsageError: no weights can be downloaded, or a file does not exist.
        LightspineError: the download failed, or the file does not fit the model.
    """
    if cfg.file:
        path, url, sha256 = _local_file(Path(cfg.file)), "", ""
    else:
        file = _fetch(name, cfg, kwargs.get("cache_dir"))
        path, url, sha256 = file.path, file.source, file.sha256
    whole = build({key: value for key, value in kwargs.items() if key not in FEATURE_OPTIONS})
    report = load_checkpoint(whole, path, drop_head=True if "num_classes" in kwargs else None)
    report.url, report.sha256 = url, sha256
    model = build(kwargs) if kwargs.get("features_only") else whole
    if model is not whole:
        copy_tensors(whole, model.model)
    model.load_report = report
    return cast(nn.Module, model)


def is_published(name: str) -> bool:
    """Return whether a name with a tag, such as `vmamba_tiny.in1k`, stands for published weights."""
    model, _, tag = name.partition(".")
    if name in DENSE_WEIGHTS:
        return True
    return bool(tag) and find_record(model) is not None and name in published_cfgs(model)


def is_checkpoint(name: str | Path) -> bool:
    """Return whether a text is the path of a file or the name of published weights, not of a model."""
    return Path(name).is_file() or is_published(str(name))


def fetch_published(name: str, cache_dir: str | Path | None = None) -> WeightsFile:
    """Return the file of published weights by name and tag; downloads it at the first call.

    Raises:
        UsageError: the process is offline.
        LightspineError: the download failed.
    """
    model = name.partition(".")[0]
    if name in DENSE_WEIGHTS:
        return fetch_weights(model, DENSE_WEIGHTS[name].cfg, cache_dir)
    return _fetch(model, published_cfgs(model)[name], cache_dir)


def _fetch(name: str, cfg: PretrainedCfg, cache_dir: str | Path | None) -> WeightsFile:
    top1 = get_record(name).published.top1
    return fetch_weights(
        name,
        cfg,
        cache_dir,
        fits=lambda path: _belongs_to(name, path),
        published_score="" if top1 is None else f"{top1} % top-1",
    )


def copy_tensors(source: nn.Module, target: nn.Module) -> None:
    """Load the tensors of a model into a part of the same model, such as that of a feature extractor."""
    tensors = source.state_dict()
    target.load_state_dict({key: tensors[key] for key in target.state_dict()})


def _local_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in TIMM_FILES if (path / name).is_file()]
    if not found:
        raise UsageError(f"no weights in the folder {path}: expected {' or '.join(TIMM_FILES)}")
    return found[0]


def _belongs_to(name: str, path: Path) -> bool:
    return any(_compare(name, shapes_of(t)).exact for t in read_checkpoint(path).entries.values())


def _check_finite(report: LoadReport, fitted: dict[str, Tensor], model: nn.Module) -> None:
    broken = [name for name, _ in model.named_parameters() if name in fitted and not _is_finite(fitted[name])]
    if broken:
        raise LightspineError(
            f"{report.source} holds NaN or infinity in {len(broken)} weights, the first of which is "
            f"{broken[0]}: the training diverged, or the file is damaged"
        )


def _is_finite(tensor: Tensor) -> bool:
    # PyTorch has no isfinite for numbers of 8 bits.
    values = tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor
    return not values.is_floating_point() or bool(values.isfinite().all())


def _keep_layout(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    del model
    return state_dict


def _record_conversions(
    report: LoadReport,
    found: dict[str, Tensor],
    fitted: dict[str, Tensor],
    filter_fn: FilterFn,
    model: nn.Module,
) -> None:
    """Record what the filter function did: it mostly moves tensors, which their storage identifies."""
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
        # Not identified by its storage: it was used if the filter's result lacks a key without it.
        without = {k: v for k, v in found.items() if k != key}
        with shape_errors(f"{report.source} cannot be converted without {key}"):
            remaining = filter_fn(without, model).keys()
        if remaining == fitted.keys():
            report.dropped.append(key)
    report.dropped.sort(key=list(found).index)


def _adapt_input_channels(report: LoadReport, fitted: dict[str, Tensor], model: nn.Module) -> None:
    first = getattr(model, "default_cfg", {}).get("first_conv")
    names = (first,) if isinstance(first, str) else tuple(first or ())
    for name in names:
        key = f"{name}.weight"
        module = dict(model.named_modules()).get(name)
        if key not in fitted or not isinstance(module, nn.Conv2d) or fitted[key].ndim != 4:
            continue
        received, expected = fitted[key].shape[1], module.weight.shape[1]
        if received == 3 and expected not in (0, 3):
            fitted[key] = adapt_input_conv(expected, fitted[key])
            report.converted[key] = f"adapted from 3 to {expected} input channels"


def _classifier_tensors(model: nn.Module) -> list[str]:
    names = getattr(model, "default_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


def _drop_mismatched_head(
    report: LoadReport, fitted: dict[str, Tensor], model: nn.Module, drop_head: bool | None
) -> None:
    if drop_head is None:
        published = getattr(model, "default_cfg", {}).get("num_classes")
        drop_head = getattr(model, "num_classes", published) != published
    if not drop_head:
        return
    expected = model.state_dict()
    for key in _classifier_tensors(model):
        if key in fitted and (key not in expected or expected[key].shape != fitted[key].shape):
            del fitted[key]
            report.dropped.append(key)
            report.dropped_head = True
            report.converted.pop(key, None)


def _record_mismatches(report: LoadReport, fitted: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    report.missing = [key for key in expected if key not in fitted]
    report.unexpected = [key for key in fitted if key not in expected]
    report.mismatched = {
        key: (tuple(tensor.shape), tuple(expected[key].shape))
        for key, tensor in fitted.items()
        if key in expected and tensor.shape != expected[key].shape
    }


def _mismatch_message(report: LoadReport, name: str, model: nn.Module, found: dict[str, Tensor]) -> str:
    heads, pairs = set(_classifier_tensors(model)), list(report.mismatched.values())
    is_other_head = not (report.mismatched.keys() - heads or report.missing or report.unexpected)
    if pairs and is_other_head and all(theirs and theirs[1:] == ours[1:] for theirs, ours in pairs):
        (received, *_), (expected, *_) = pairs[0]
        return (
            f"{report.source} has a head of {received} classes and the model one of {expected}: "
            f"pass num_classes={received} to keep it, or drop_head=True to leave it out"
        )
    guess = identify_tensors(found)
    what = f"is a checkpoint of {guess}" if guess and guess.name != name else "does not fit"
    return f"{report.source} {what}, expected {name}: {report.mismatches()}"


@dataclass(frozen=True)
class Identification:
    """The registered model that a set of tensors fits best.

    Attributes:
        name: registered name.
        family: its family.
        fitting: number of tensors that fit by name and shape.
        expected: number of tensors of the model.
        received: number of tensors of the checkpoint, after conversion to the layout of this library.
        mismatches: the first few tensors that do not fit, "" when all do.
    """

    name: str
    family: str
    fitting: int
    expected: int
    received: int
    mismatches: str

    @property
    def exact(self) -> bool:
        """Whether every tensor fits and none is left over."""
        return self.fitting == self.expected == self.received

    def __str__(self) -> str:
        """The name, and for a partial fit the share of fitting tensors."""
        most = max(self.expected, self.received)
        return self.name if self.exact else f"{self.name} ({self.fitting} of {most} tensors fit)"


# What indexing and reshaping a tensor of unexpected shape raises.
_SHAPE_ERRORS = (LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def shape_errors(failure: str) -> Iterator[None]:
    """Raise a LightspineError if the tensors of a file have shapes that a conversion cannot handle.

    Args:
        failure: start of the message, such as "weights.pth does not fit shvit_s1".
    """
    try:
        yield
    except LightspineError:
        raise
    except _SHAPE_ERRORS as error:
        raise LightspineError(f"{failure}: its tensors have unexpected shapes ({error})") from error


@cache
def build_on_meta(name: str) -> nn.Module:
    """Return a registered model without memory for its tensors; shared, so not to be changed."""
    with torch.device("meta"):
        return get_record(name).create()


@cache
def _tensors_on_meta(name: str) -> dict[str, Tensor]:
    """Return the state dict of `build_on_meta`; shared, so not to be changed."""
    return build_on_meta(name).state_dict()


def shapes_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same shapes and dtypes on the meta device."""
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in state_dict.items()}


def identify_tensors(state_dict: dict[str, Tensor]) -> Identification | None:
    """Return the registered model that a state dict fits best, or `None` if less than half of it fits.

    Args:
        state_dict: one entry of a checkpoint, in the official, timm's or this library's layout.
    """
    shapes = shapes_of(state_dict)
    best: tuple[float, int, Identification] | None = None
    for name in _likely_models(shapes):
        found = _compare(name, shapes)
        score = found.fitting / max(found.expected, found.received)
        # Variants may differ only in tensors that the filter function resizes or drops: compare the sizes.
        distance = -abs(_count_numbers(shapes) - _count_numbers(_tensors_on_meta(name)))
        if best is None or (score, distance) > best[:2]:
            best = (score, distance, found)
    return best[2] if best is not None and best[0] > 0.5 else None


def compare_with_model(name: str, kwargs: dict[str, Any], state_dict: dict[str, Tensor]) -> Identification:
    """Return how the tensors of a state dict fit a registered model with the given arguments."""
    with torch.device("meta"):
        model = get_record(name).create(**kwargs)
    return _compare(name, shapes_of(state_dict), model)


def _likely_models(shapes: dict[str, Tensor]) -> list[str]:
    """Return the models of the family whose tensor names the state dict has most of.

    The variants of a family have tensors of the same names, so that one of them stands for all: building
    every registered model takes seconds. Of tensors with unknown names only, none is returned.
    """
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(get_record(name).family, []).append(name)
    known = {family: _count_known_names(names[0], shapes) for family, names in families.items()}
    most = max(known.values(), default=0)
    return [name for family, names in families.items() if 0 < known[family] == most for name in names]


def _count_known_names(name: str, shapes: dict[str, Tensor]) -> int:
    return len(_convert_shapes(name, shapes, build_on_meta(name)).keys() & _tensors_on_meta(name).keys())


def _convert_shapes(name: str, shapes: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors under the names of a model; unchanged if their shapes cannot be converted."""
    try:
        return get_record(name).checkpoint_filter_fn(dict(shapes), model)
    except (LightspineError, *_SHAPE_ERRORS):
        return shapes


def _compare(name: str, shapes: dict[str, Tensor], model: nn.Module | None = None) -> Identification:
    record = get_record(name)
    fitted = _convert_shapes(name, shapes, build_on_meta(name) if model is None else model)
    report = LoadReport(source="", entry="", is_ema=False)
    _record_mismatches(report, fitted, _tensors_on_meta(name) if model is None else model.state_dict())
    fitting = len(fitted) - len(report.unexpected) - len(report.mismatched)
    expected = fitting + len(report.mismatched) + len(report.missing)
    return Identification(name, record.family, fitting, expected, len(fitted), report.mismatches())


def _count_numbers(state_dict: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state_dict.values())
