"""Detector and segmenter checkpoints: files that contain the arguments of the network."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from lightspine.dense.official import describe_official, differs_by_classes, load_official
from lightspine.errors import LightspineError, UsageError
from lightspine.heads.detectors import DetectorName
from lightspine.heads.mask_rcnn import MaskRCNN
from lightspine.heads.retinanet import RetinaNet
from lightspine.heads.segmenters import Segmenter
from lightspine.models.checkpoint import EMA_ENTRIES, NETWORK_KEY, Checkpoint, Weights, read_checkpoint
from lightspine.models.loading import LoadReport
from lightspine.models.metadata import RUN_KEY, check_description
from lightspine.models.saving import write_safetensors
from lightspine.utils.files import parse_json

DenseNetwork = RetinaNet | MaskRCNN | Segmenter


@dataclass(frozen=True, kw_only=True)
class NetworkMetadata:
    """Metadata of a detector or segmenter checkpoint.

    Attributes:
        kind: "detector" or "segmenter".
        head: see `create_detector` and `create_segmenter`.
        model: name of the backbone model.
        num_classes: number of classes.
        options: further arguments of `create_detector` or `create_segmenter`.
        class_names: one name per class, or `None`.
        preprocessing: `mean` and `std` of a segmenter's images; a detector normalizes its images itself.
        settings: inference settings, such as a segmenter's `scale`.
        run: see `lightspine.models.ModelMetadata`.
        metadata: further strings, such as the score.
    """

    kind: Literal["detector", "segmenter"]
    head: str
    model: str
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def save_network(
    network: DenseNetwork,
    path: str | Path,
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Save a detector or segmenter as one safetensors file.

    Args:
        network: from `create_detector` or `create_segmenter`.
        path: file to write, with the suffix .safetensors; an existing file is replaced atomically.
        class_names: one name per class.
        preprocessing: see `NetworkMetadata`.
        settings: see `NetworkMetadata`.
        metadata: further strings, such as the score.

    Returns:
        The path.

    Raises:
        UsageError: another suffix, a wrong number of class names, or a network from elsewhere.
        LightspineError: the file cannot be written.
    """
    described = network_metadata(
        network, class_names=class_names, preprocessing=preprocessing, settings=settings
    )
    return write_safetensors(network, path, described | (metadata or {}))


def network_metadata(
    network: DenseNetwork,
    *,
    class_names: list[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return the metadata that rebuild a detector or segmenter; see `save_network`.

    Raises:
        UsageError: a wrong number of class names, or a network from elsewhere.
    """
    init_args = getattr(network, "init_args", None)
    if not isinstance(init_args, dict) or "head" not in init_args:
        raise UsageError("expected a network from create_detector or create_segmenter")
    if class_names is not None and len(class_names) != init_args["num_classes"]:
        raise UsageError(f"expected {init_args['num_classes']} class names, got {len(class_names)}")
    description = {key: init_args[key] for key in ("head", "model", "num_classes", "options")}
    description |= {
        "class_names": class_names,
        "preprocessing": preprocessing or {},
        "settings": settings or {},
    }
    return {NETWORK_KEY: json.dumps(description)}


def read_network_metadata(source: str | Path | Checkpoint, *, model: str | None = None) -> NetworkMetadata:
    """Read the metadata of a detector or segmenter checkpoint; those of an OpenMMLab file are recognized.

    Args:
        source: the file, or an opened checkpoint.
        model: expected backbone, which decides between models that an OpenMMLab file does not tell apart.

    Raises:
        UsageError: the file does not exist or holds no detector or segmenter.
        LightspineError: the metadata are damaged, or the file holds an unknown network of OpenMMLab.
    """
    checkpoint = read_checkpoint(source)
    if checkpoint.is_openmmlab:
        return _official_metadata(checkpoint, model)
    strings = dict(checkpoint.metadata)
    text = strings.pop(NETWORK_KEY, None)
    if text is None:
        raise UsageError(f"expected a detector or segmenter in {checkpoint.label}, got a file without one")
    try:
        description = parse_json(text)
        run = parse_json(strings.pop(RUN_KEY, "{}"))
        # JSON has no tuples.
        if description["options"].get("resize") is not None:
            description["options"]["resize"] = tuple(description["options"]["resize"])
        kind: Any = "detector" if description["head"] in get_args(DetectorName) else "segmenter"
        if kind == "detector":
            # Files of earlier versions, whose detectors were trained and evaluated so, do not have it.
            description["options"].setdefault("resize_rounding", "down")
        found = NetworkMetadata(kind=kind, **description, run=run, metadata=strings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LightspineError(f"{checkpoint.label} has damaged metadata: {error!r}") from error
    check_description(
        checkpoint.label,
        name=found.model,
        class_names=found.class_names,
        preprocessing=found.preprocessing,
        run=found.run,
        settings=found.settings,
    )
    if found.class_names is not None and len(found.class_names) != found.num_classes:
        raise LightspineError(
            f"{checkpoint.label} has damaged metadata: expected {found.num_classes} class names, "
            f"found {len(found.class_names)}"
        )
    return found


def _official_metadata(checkpoint: Checkpoint, model: str | None) -> NetworkMetadata:
    found = describe_official(checkpoint, model)
    # All published detectors and segmenters were trained with ImageNet's statistics.
    statistics = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    return NetworkMetadata(
        kind=found.kind,
        head=found.head,
        model=found.model,
        num_classes=found.num_classes,
        options=found.options,
        class_names=found.class_names,
        preprocessing=statistics,
        settings=found.settings,
    )


def check_network(checkpoint: Checkpoint, metadata: NetworkMetadata, head: str, model: str) -> None:
    """Check that a file holds a network with this head and backbone model.

    Raises:
        UsageError: it holds another network.
    """
    if (metadata.head, metadata.model) != (head, model):
        layout = "an OpenMMLab checkpoint of " if checkpoint.is_openmmlab else ""
        raise UsageError(
            f"expected weights of {head} over {model}, "
            f"but {checkpoint.label} holds {layout}{metadata.head} over {metadata.model} with "
            f"{metadata.num_classes} classes: give the head and model of the file "
            f"(--model.head={metadata.head} --model.model={metadata.model}), or a classifier of {model}"
        )


def load_pretrained(
    network: Any, source: str | Path | Checkpoint, *, weights: Weights = "auto"
) -> LoadReport:
    """Load the weights of a detector or segmenter with the same head and backbone model.

    If the numbers of classes differ, the layers that depend on them keep their initial values.

    Args:
        network: from `create_detector` or `create_segmenter`.
        source: file of `save_network`, a training checkpoint (`.ckpt`), or an OpenMMLab checkpoint.
        weights: "model" (as trained), "ema" (their average), or "auto" for the ones that the run validated.

    Raises:
        UsageError: the file holds another head or backbone model, or has no such weights.
        LightspineError: the file cannot be read, or tensors are missing, unknown or of another shape, other
            than those of the class layers.
    """
    checkpoint = read_checkpoint(source)
    if checkpoint.is_openmmlab:
        return load_official(network, checkpoint, weights=weights)
    metadata, init_args = read_network_metadata(checkpoint), network.init_args
    check_network(checkpoint, metadata, init_args["head"], init_args["model"])
    entry = checkpoint.select(weights)
    expected, tensors = network.state_dict(), checkpoint.entries[entry]
    report = LoadReport(source=checkpoint.label, entry=entry, is_ema=entry in EMA_ENTRIES)
    fitting = {}
    for name, tensor in tensors.items():
        if name not in expected:
            report.unexpected.append(name)
        elif tensor.shape == expected[name].shape:
            fitting[name] = tensor
        elif differs_by_classes(tensor, expected[name], metadata.num_classes, init_args["num_classes"]):
            report.dropped.append(name)
        else:
            report.mismatched[name] = tuple(tensor.shape), tuple(expected[name].shape)
    absent = [name for name in expected if name not in tensors]
    report.missing = [*report.dropped, *absent]
    if absent or not report.complete:
        differing = _describe_differences(metadata.options, init_args["options"])
        raise LightspineError(
            f"{checkpoint.label} does not fit the network: {report.mismatches()}{differing}"
        )
    report.dropped_head = bool(report.dropped)
    report.loaded = list(fitting)
    network.load_state_dict(fitting, strict=False)
    return report


def _describe_differences(in_file: dict[str, Any], in_network: dict[str, Any]) -> str:
    """Describe the arguments that decide the shapes of the weights and differ, "" if there are none."""
    keys = [
        key
        for key in ("model_args", "norm", "channels", "auxiliary_weight")
        if in_file.get(key) != in_network.get(key)
    ]
    if not keys:
        return ""
    file, network = (
        ", ".join(f"{key}={options.get(key)}" for key in keys) for options in (in_file, in_network)
    )
    return f"; the file was saved with {file}, but the network has {network}"
