"""Checkpoints of detectors and segmenters: safetensors files with the arguments that build the network."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from lightspine.errors import LightspineError, UsageError
from lightspine.heads.detectors import DetectorName
from lightspine.heads.mask_rcnn import MaskRCNN
from lightspine.heads.retinanet import RetinaNet
from lightspine.heads.segmenters import Segmenter
from lightspine.models.checkpoint import NETWORK_KEY, read_checkpoint, write_safetensors
from lightspine.models.loading import LoadReport

DenseNetwork = RetinaNet | MaskRCNN | Segmenter


@dataclass(frozen=True, kw_only=True)
class NetworkMetadata:
    """What a file says about its detector or segmenter.

    Attributes:
        kind: "detector" or "segmenter".
        head: see `create_detector` and `create_segmenter`.
        model: name of the model that gives the maps.
        num_classes: number of classes.
        options: further arguments of `create_detector` or `create_segmenter`.
        class_names: one name per class, or `None`.
        preprocessing: `mean` and `std` of the images of a segmenter; a detector normalises its own.
        settings: how the network looks at images outside training, such as a segmenter's `scale`.
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
        network: made by `create_detector` or `create_segmenter`.
        path: file to write, replaced in one step if it exists; its name ends in .safetensors.
        class_names: one name per class.
        preprocessing: see `NetworkMetadata`.
        settings: see `NetworkMetadata`.
        metadata: further strings.

    Returns:
        The path.

    Raises:
        UsageError: another name, another number of class names, a network that was made otherwise.
        LightspineError: the file cannot be written.
    """
    init_args = getattr(network, "init_args", None)
    if not isinstance(init_args, dict) or "head" not in init_args:
        raise UsageError("expected a network that create_detector or create_segmenter made")
    if class_names is not None and len(class_names) != init_args["num_classes"]:
        raise UsageError(f"expected {init_args['num_classes']} class names, got {len(class_names)}")
    about = {key: init_args[key] for key in ("head", "model", "num_classes", "options")}
    about |= {
        "class_names": class_names,
        "preprocessing": preprocessing or {},
        "settings": settings or {},
    }
    return write_safetensors(network, path, {NETWORK_KEY: json.dumps(about)} | (metadata or {}))


def read_network_metadata(path: str | Path) -> NetworkMetadata:
    """Return what a file says about its network, without reading its tensors; see `load_network`."""
    metadata = dict(read_checkpoint(path).metadata)
    text = metadata.pop(NETWORK_KEY, None)
    if text is None:
        raise UsageError(f"expected a detector or segmenter in {path}, got a file without one")
    try:
        about = json.loads(text)
        # JSON has no tuples.
        if "resize" in about["options"] and about["options"]["resize"] is not None:
            about["options"]["resize"] = tuple(about["options"]["resize"])
        kind: Any = "detector" if about["head"] in get_args(DetectorName) else "segmenter"
        return NetworkMetadata(kind=kind, **about, metadata=metadata)
    except (ValueError, TypeError, KeyError) as error:
        raise LightspineError(f"{path} has damaged metadata: {error!r}") from error


def is_network_file(path: str | Path) -> bool:
    """Tell whether a file was written by `save_network`, without reading its tensors."""
    return read_checkpoint(path).is_dense


def load_pretrained(network: Any, path: str | Path) -> LoadReport:
    """Load a file of `save_network`; with another number of classes, what depends on it is left as it is.

    Args:
        network: made by `create_detector` or `create_segmenter`.
        path: the file.

    Raises:
        UsageError: the file is of another head or model.
        LightspineError: it cannot be read, or tensors are missing, unknown or of another shape.
    """
    file = read_checkpoint(path)
    try:
        made = json.loads(file.metadata[NETWORK_KEY])
        found, classes = (made["head"], made["model"]), made["num_classes"]
    except (KeyError, ValueError, TypeError) as error:
        raise LightspineError(f"{file.label} has damaged metadata: {error!r}") from error
    init_args = network.init_args
    if found != (init_args["head"], init_args["model"]):
        raise UsageError(
            f"expected weights of {init_args['name']}, but {file.label} holds {found[0]} over {found[1]}"
        )
    return _load(network, next(iter(file.entries.values())), file.label, classes == init_args["num_classes"])


def _load(network: nn.Module, tensors: dict[str, Any], label: str, same_classes: bool) -> LoadReport:
    expected = network.state_dict()
    report = LoadReport(source=label, entry="", is_ema=False)
    fitting = {}
    for name, tensor in tensors.items():
        if name not in expected:
            report.unexpected.append(name)
        elif tensor.shape == expected[name].shape:
            fitting[name] = tensor
        elif same_classes:
            report.mismatched[name] = tuple(tensor.shape), tuple(expected[name].shape)
        else:
            report.dropped.append(name)
            report.missing.append(name)
    lacking = [name for name in expected if name not in tensors]
    report.missing += lacking
    if lacking or not report.complete:
        raise LightspineError(f"{label} does not fit the network: {report.mismatches()}")
    report.dropped_head = bool(report.dropped)
    report.loaded = list(fitting)
    network.load_state_dict(fitting, strict=False)
    return report
