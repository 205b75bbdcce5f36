"""Files of detectors and segmenters: safetensors that say how to build their network."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lightspine.dense.networks import DenseNetwork, create_detector, create_segmenter
from lightspine.dense.starting import start_from
from lightspine.errors import LightspineError, UsageError
from lightspine.heads.detectors import DetectorName
from lightspine.models._reading import read_metadata
from lightspine.models._saving import NETWORK_KEY, write_safetensors


@dataclass(frozen=True, kw_only=True)
class SavedNetwork:
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
        preprocessing: see `SavedNetwork`.
        settings: see `SavedNetwork`.
        metadata: further strings.

    Returns:
        The path.

    Raises:
        UsageError: another name, another number of class names, a network that was made otherwise.
        LightspineError: the file cannot be written.
    """
    creation = getattr(network, "creation", None)
    if not isinstance(creation, dict) or "head" not in creation:
        raise UsageError("expected a network that create_detector or create_segmenter made")
    if class_names is not None and len(class_names) != creation["num_classes"]:
        raise UsageError(f"expected {creation['num_classes']} class names, got {len(class_names)}")
    about = {key: creation[key] for key in ("head", "model", "num_classes", "options")}
    about |= {
        "class_names": class_names,
        "preprocessing": preprocessing or {},
        "settings": settings or {},
    }
    return write_safetensors(network, path, {NETWORK_KEY: json.dumps(about)} | (metadata or {}))


def load_network(path: str | Path, **head_args: Any) -> tuple[DenseNetwork, SavedNetwork]:
    """Build the detector or segmenter of a file that `save_network` wrote.

    Args:
        path: the file.
        **head_args: arguments of the head that take the place of those in the file, such as
            `score_threshold`.

    Returns:
        The network in evaluation mode, and what is known about it.

    Raises:
        UsageError: no such file, or one of a classifier.
        LightspineError: the file cannot be read or does not fit.
    """
    saved = read_saved_network(path)
    saved = replace(saved, options=saved.options | head_args)
    create: Any = create_detector if saved.kind == "detector" else create_segmenter
    network: DenseNetwork = create(saved.head, saved.model, saved.num_classes, **saved.options)
    network.load_report = start_from(network, path)
    return network.eval(), saved


def read_saved_network(path: str | Path) -> SavedNetwork:
    """Return what a file says about its network, without reading its tensors; see `load_network`."""
    metadata = dict(read_metadata(path))
    text = metadata.pop(NETWORK_KEY, None)
    if text is None:
        raise UsageError(f"expected a detector or segmenter in {path}, got a file without one")
    try:
        about = json.loads(text)
        # JSON has no tuples.
        if "resize" in about["options"] and about["options"]["resize"] is not None:
            about["options"]["resize"] = tuple(about["options"]["resize"])
        kind: Any = "detector" if about["head"] in get_args(DetectorName) else "segmenter"
        return SavedNetwork(kind=kind, **about, metadata=metadata)
    except (ValueError, TypeError, KeyError) as error:
        raise LightspineError(f"{path} has damaged metadata: {error!r}") from error
