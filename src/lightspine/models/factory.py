"""Create models by name or from a checkpoint file, and convert checkpoint files."""

import pickle
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import Checkpoint, CheckpointSource, Weights, read_checkpoint
from lightspine.models.loading import (
    FEATURE_OPTIONS,
    Identification,
    build_on_meta,
    compare_with_model,
    copy_tensors,
    identify_tensors,
    load_checkpoint,
    shape_errors,
    shapes_of,
)
from lightspine.models.metadata import (
    BUILD_ERRORS,
    FOREIGN_ARGUMENTS,
    ModelMetadata,
    check_architecture,
    check_arguments,
    default_preprocessing,
    flatten_arguments,
    limit_modules,
    read_model_metadata,
)
from lightspine.models.pickle_check import check_pickled_file
from lightspine.models.registry import find_record, get_record, own_name, timm_name
from lightspine.models.saving import save_checkpoint
from lightspine.models.weights import check_hub_pickle, hub_errors, hub_reached_or_cached

# Arguments that name the initial weights, not the model.
_WEIGHTS_OPTIONS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: CheckpointSource | None = None,
    weights: Weights = "auto",
    **kwargs: Any,
) -> nn.Module:
    """Create a model by name, optionally with the weights of a checkpoint.

    Names of this library take precedence; any other name is created by timm, with timm's arguments, and
    `timm/NAME` always by timm.

    Args:
        name: such as `vmamba_tiny`, `timm/shvit_s1`, or `vmamba_tiny.in1k` with the tag of its weights; see
            `lightspine.list_models()`. `hf-hub:ORG/NAME` and `local-dir:PATH` stand for a model in timm's
            layout (`timm.models.push_to_hf_hub` and `save_for_hf`).
        pretrained: load the published weights, downloaded at the first call (`lightspine weights --all` lists
            them); not with `checkpoint`.
        checkpoint: official, timm or lightspine checkpoint, loaded strictly (`lightspine.load_checkpoint`).
            With `num_classes`, a head of another size in the file is dropped; with `in_chans`, the first
            convolution is adapted as in timm.
        weights: entry of the file: "model", "ema", or "auto" for the one with the published score.
        **kwargs: arguments of the model (`num_classes`, `in_chans`, `drop_path_rate`, `features_only`...) and
            timm's `pretrained_cfg`, `pretrained_cfg_overlay` and `cache_dir`.

    Returns:
        The model, in training mode. `model.load_report` describes what was loaded.

    Raises:
        UsageError: unknown name (the message suggests similar ones), tag, file or entry; or `pretrained` for
            a model whose authors offer no file that a program can download.
        LightspineError: the checkpoint cannot be downloaded or read, or belongs to another family or variant.

    Examples:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1", num_classes=10).eval()
        >>> model(torch.zeros(1, 3, 97, 161)).shape
        torch.Size([1, 10])
    """
    if pretrained and checkpoint is not None:
        raise UsageError("expected pretrained=True or a checkpoint, received both")
    if "checkpoint_path" in kwargs:
        raise UsageError(
            f"expected checkpoint=PATH for the weights of {name}, received timm's argument checkpoint_path"
        )
    label = name
    name, kwargs = _resolve_name(name, kwargs)
    timm_name(name)  # checks the name
    if checkpoint is not None and kwargs.get("features_only"):
        model = _create_feature_extractor(name, checkpoint, weights, kwargs)
    else:
        arguments = {"pretrained": True, **kwargs} if pretrained else kwargs
        is_foreign = ":" in label
        model = _build_from_config(label, name, arguments) if is_foreign else _build(name, arguments)
        if checkpoint is not None:
            drop_head = True if "num_classes" in kwargs else None
            model.load_report = load_checkpoint(model, checkpoint, weights=weights, drop_head=drop_head)
    # Saved by `save_checkpoint`, so that the file alone is enough to rebuild the model.
    kept = {key: value for key, value in kwargs.items() if key not in _WEIGHTS_OPTIONS}
    model.init_args = {"name": name, "kwargs": kept, "pretrained": pretrained}
    return cast(nn.Module, model)


def _resolve_name(name: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the registered name and the arguments that a name with a tag or a saved model stands for."""
    scheme, _, place = name.partition(":")
    if place:
        if scheme not in ("hf-hub", "hf_hub", "local-dir"):
            raise UsageError(f"expected a model name, hf-hub:ORG/NAME or local-dir:PATH, received {name!r}")
        cfg, name, arguments = _read_timm_config(scheme, place, kwargs.get("cache_dir"))
        return own_name(name), {**arguments, "pretrained_cfg": cfg, **kwargs}
    base, _, tag = name.partition(".")
    base = own_name(base)
    if tag and find_record(base):
        return base, {"pretrained_cfg": tag, **kwargs}
    return own_name(name), kwargs


def _read_timm_config(
    scheme: str, place: str, cache_dir: str | Path | None
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return the pretrained configuration, the model name and its arguments of a model in timm's layout."""
    try:
        if scheme == "local-dir":
            cfg, name, arguments = load_model_config_from_path(place)
        else:
            with hub_errors(f"{place}/config.json"):
                cfg, name, arguments = load_model_config_from_hf(place, cache_dir=cache_dir)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LightspineError(f"{scheme}:{place} holds no model in timm's layout: {error}") from error
    return _check_timm_config(f"{scheme}:{place}", cfg, name, arguments)


# Fields that would load other weights than those beside the configuration.
_FOREIGN_SOURCES = ("url", "state_dict", "hf_hub_filename", "custom_load")
# Numbers in the configuration of a model, such as the number of classes or of blocks.
_LARGEST_NUMBER = 2**16
_MOST_BLOCKS = 1000
_MOST_MODULES = 20_000
# More than the largest model of timm has.
_MOST_NUMBERS = 2**33


def _check_timm_config(
    label: str, cfg: Any, name: Any, arguments: Any
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Check a configuration, which may be that of somebody else; return it without other sources of weights.

    Raises:
        LightspineError: it names other files, or numbers that no model has.
    """
    if not isinstance(name, str) or not isinstance(arguments, dict) or not isinstance(cfg, dict):
        raise LightspineError(f"{label} holds no model in timm's layout: expected a name and arguments")
    check_architecture(label, name)
    for argument, value in flatten_arguments(arguments):
        if argument in FOREIGN_ARGUMENTS:
            raise LightspineError(f"{label} is refused: its model argument {argument} names another file")
        limit = _MOST_BLOCKS if "depth" in argument or "layers" in argument else _LARGEST_NUMBER
        if isinstance(value, int | float) and not abs(value) <= limit:
            raise LightspineError(f"{label} is refused: its model argument {argument} is beyond {limit}")
    known = {field.name for field in fields(PretrainedCfg)} - {*_FOREIGN_SOURCES}
    kept = {key: value for key, value in cfg.items() if key in known}
    for key in ("num_classes", "input_size"):
        for _, value in flatten_arguments({key: kept.get(key)}):
            if isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
                raise LightspineError(f"{label} is refused: its {key} is beyond {_LARGEST_NUMBER}")
    # The tag of the configuration is that of other weights.
    return kept | {"tag": None}, name, dict(arguments)


def _build_from_config(label: str, name: str, kwargs: dict[str, Any]) -> Any:
    """Build a model from the configuration of somebody else, whose values may be of any type."""
    scheme, _, place = label.partition(":")
    if kwargs.get("pretrained") and scheme == "local-dir":
        for file in sorted(Path(place).glob("*")):
            if file.name.endswith((".bin", ".pth", ".pth.tar")):
                check_pickled_file(file)
    elif kwargs.get("pretrained"):
        check_hub_pickle(place, kwargs.get("cache_dir"))
    try:
        # Without memory first: an argument may ask for any amount.
        with torch.device("meta"), limit_modules(label, _MOST_MODULES):
            planned = _build(name, kwargs | {"pretrained": False})
        if (needed := sum(tensor.numel() for tensor in planned.state_dict().values())) > _MOST_NUMBERS:
            raise LightspineError(f"{label} is refused: its model arguments describe {needed:,} numbers")
        return _build(name, kwargs)
    except LightspineError:
        raise
    except (*BUILD_ERRORS, OSError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise LightspineError(f"{label} describes a model that cannot be built: {reason}") from error


def _build(name: str, kwargs: dict[str, Any]) -> Any:
    theirs = timm_name(name)
    if theirs is None:
        return get_record(name).create(**kwargs)
    with hub_reached_or_cached(f"timm/{theirs}") if kwargs.get("pretrained") else nullcontext():
        return timm.create_model(theirs, **kwargs)


def _create_feature_extractor(
    name: str, checkpoint: CheckpointSource, weights: Weights, kwargs: dict[str, Any]
) -> Any:
    """Load the whole model first, because a `features_only` wrapper has only a part of the tensors."""
    file = read_checkpoint(checkpoint)
    whole = _build(name, {key: value for key, value in kwargs.items() if key not in FEATURE_OPTIONS})
    report = load_checkpoint(whole, file, weights=weights, drop_head=True)
    wrapper = _build(name, kwargs)
    inner = getattr(wrapper, "model", None)
    if isinstance(inner, nn.Module):
        copy_tensors(whole, inner)
    else:
        # timm's other wrappers rename the modules, so let timm load the state dict.
        overlay = {"state_dict": dict(file.entries[report.entry])}
        wrapper = _build(name, kwargs | {"pretrained": True, "pretrained_cfg_overlay": overlay})
    wrapper.load_report = report
    return wrapper


def load_model(
    source: str | Path | Checkpoint,
    *,
    name: str | None = None,
    weights: Weights = "auto",
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, ModelMetadata]:
    """Rebuild the model of a checkpoint file and load its weights.

    A lightspine file describes its model; the variant of an official or timm file is identified by its
    tensors.

    Args:
        source: the file, or an opened `Checkpoint`.
        name: registered name, for a file that does not store it.
        weights: "model", "ema", or "auto" for the entry with the published score.
        device: device of the model; by default the CPU.
        **kwargs: arguments of the model that replace those in the file.

    Returns:
        The model in evaluation mode (`model.load_report` describes what was loaded), and its metadata.

    Raises:
        UsageError: unknown file, entry or name.
        LightspineError: the file cannot be read, or fits no registered model.
    """
    file = read_checkpoint(source)
    metadata = describe_model(file, name=name, weights=weights)
    metadata.kwargs = metadata.kwargs | kwargs
    model: Any = create_model(metadata.name, **metadata.kwargs)
    model.load_report = load_checkpoint(model, file, weights=weights, drop_head=False)
    metadata.preprocessing = metadata.preprocessing or default_preprocessing(model)
    return cast(nn.Module, model.to(device).eval()), metadata


def describe_model(file: Checkpoint, *, name: str | None = None, weights: Weights = "auto") -> ModelMetadata:
    """Return what a checkpoint file says of its model, or what its tensors say if it does not describe it.

    Args:
        file: the opened file.
        name: registered name, for a file that does not store it.
        weights: entry whose tensors are used.

    Raises:
        UsageError: unknown entry or name, or the file holds a detector or segmenter.
        LightspineError: the file fits no registered model.
    """
    metadata = _read_checked_metadata(file)
    if metadata is None or (name is not None and name != metadata.name):
        metadata = _infer_metadata(file, name, weights)
    return metadata


def _read_checked_metadata(file: Checkpoint) -> ModelMetadata | None:
    """Read the description of the model; its arguments are used only if the tensors confirm them."""
    metadata = read_model_metadata(file)
    if metadata is not None:
        name = metadata.name
        metadata.kwargs = check_arguments(file, metadata.kwargs, lambda found: create_model(name, **found))
    return metadata


def identify_entry(file: Checkpoint, entry: str) -> Identification | None:
    """Return the registered model of one entry of a file, with the arguments that the file says or implies.

    Raises:
        LightspineError: the file is damaged.
    """
    tensors = file.entries[entry]
    saved = None if file.is_dense else _read_checked_metadata(file)
    if saved is not None and find_record(saved.name) is not None:
        return compare_with_model(saved.name, saved.kwargs, tensors)
    guess = identify_tensors(tensors)
    if guess is None or guess.exact:
        return guess
    return compare_with_model(guess.name, _infer_kwargs(guess.name, tensors), tensors)


def convert_checkpoint(
    source: str | Path | Checkpoint,
    target: str | Path,
    *,
    name: str | None = None,
    weights: Weights = "auto",
) -> nn.Module:
    """Convert an official, timm or Lightning checkpoint to a lightspine file.

    Args:
        source: file to read, or an opened checkpoint.
        target: .safetensors file to write.
        name: registered name; by default identified by the tensors.
        weights: "model", "ema", or "auto" for the entry with the published score.

    Returns:
        The model that was written; `model.load_report` describes what was converted.

    Raises:
        UsageError: unknown file, entry or name; the target does not end in .safetensors.
        LightspineError: the file cannot be read, or fits no registered model.
    """
    model, metadata = load_model(source, name=name, weights=weights)
    save_checkpoint(
        model,
        target,
        class_names=metadata.class_names,
        preprocessing=metadata.preprocessing,
        metadata=metadata.metadata,
        run=metadata.run,
    )
    return model


def _infer_metadata(file: Checkpoint, name: str | None, weights: Weights) -> ModelMetadata:
    tensors = next(iter(file.entries.values())) if weights == "auto" else file.entries[file.select(weights)]
    if name is None:
        guess = identify_tensors(tensors)
        if guess is None:
            raise LightspineError(
                f"{file.label} fits no registered model: pass the model's name if it is one of timm's"
            )
        name = guess.name
    return ModelMetadata(name, _infer_kwargs(name, tensors))


def _infer_kwargs(name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Infer `num_classes`, `in_chans` and the family's own arguments from the shapes of the tensors."""
    record, model = get_record(name), build_on_meta(name)
    cfg: Any = model.default_cfg
    with shape_errors(f"the checkpoint does not fit {name}"):
        fitted = record.checkpoint_filter_fn(shapes_of(tensors), model)
        kwargs: dict[str, Any] = dict(record.infer_kwargs(tensors)) if record.infer_kwargs else {}
    first_conv, classifier = cfg["first_conv"], cfg["classifier"]
    head = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if head in fitted and fitted[head].ndim == 2 and fitted[head].shape[0] != cfg["num_classes"]:
        kwargs["num_classes"] = fitted[head].shape[0]
    stem = f"{first_conv}.weight"
    if stem in fitted and fitted[stem].ndim == 4 and fitted[stem].shape[1] != cfg["input_size"][0]:
        kwargs["in_chans"] = fitted[stem].shape[1]
    return kwargs
