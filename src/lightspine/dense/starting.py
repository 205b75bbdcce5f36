"""Weights of one detector or segmenter for another of the same kind, with other classes or the same."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from lightspine.errors import LightspineError, UsageError
from lightspine.models._reading import read_checkpoint, read_metadata
from lightspine.models._report import LoadReport
from lightspine.models._saving import NETWORK_KEY


def is_network_file(path: str | Path) -> bool:
    """Tell whether a file was written by `save_network`, without reading its tensors."""
    return NETWORK_KEY in read_metadata(path)


def start_from(network: Any, path: str | Path) -> LoadReport:
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
    creation = network.creation
    if found != (creation["head"], creation["model"]):
        raise UsageError(
            f"expected weights of {creation['name']}, but {file.label} holds {found[0]} over {found[1]}"
        )
    return _load(network, next(iter(file.entries.values())), file.label, classes == creation["num_classes"])


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
