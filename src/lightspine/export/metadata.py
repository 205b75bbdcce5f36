"""Metadata of an exported file: names, preprocessing and origin."""

import json
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from torch import nn

from lightspine._version import __version__
from lightspine.models.checkpoint import WEIGHTS_KEY
from lightspine.models.metadata import default_preprocessing
from lightspine.models.registry import own_name

METADATA_PREFIX = "lightspine."


@dataclass(kw_only=True)
class ExportMetadata:
    """Metadata that is stored in an exported file.

    Attributes:
        name: name of the model.
        kind: see `lightspine.export.program.ExportTarget`.
        class_names: one name per class, or `None`.
        preprocessing: `input_size` (channels, height, width), `interpolation`, `mean`, `std`, `crop_pct`,
            `crop_mode`.
        pixels: whether the network takes 8-bit pixels (B, H, W, C) and normalizes them itself.
        strides: strides of the output maps, if the outputs are maps.
        detection: settings of a detector (`lightspine.export.detection.DetectionSettings`), or `None`.
        precision: "fp32", "fp16", "int8-dynamic" or "int8-static".
        source: where the weights come from.
        checkpoint: metadata of the checkpoint (`lightspine.models.checkpoint.Checkpoint.metadata`), which the
            exported file keeps: arguments of model and head, settings, training run.
    """

    name: str
    kind: str
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    pixels: bool = False
    strides: tuple[int, ...] = ()
    detection: dict[str, Any] | None = None
    precision: str = "fp32"
    source: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the entries as one JSON object."""
        return json.dumps(self.entries())

    def entries(self) -> dict[str, str]:
        """Return the entries as strings; values that are not text are encoded as JSON."""
        found: dict[str, str] = {
            "model": self.name,
            "kind": self.kind,
            "class_names": json.dumps(self.class_names),
            "preprocessing": json.dumps(self.preprocessing),
            "pixels": json.dumps(self.pixels),
            "strides": json.dumps(self.strides),
            "detection": json.dumps(self.detection),
            "precision": self.precision,
            "source": json.dumps(self.source),
            "version": __version__,
        }
        if (commit := source_commit()) is not None:
            found["commit"] = commit
        # The exported file has a single set of weights.
        kept = {
            key: value
            for key, value in self.checkpoint.items()
            if key.startswith(METADATA_PREFIX) and key != WEIGHTS_KEY
        }
        return kept | {METADATA_PREFIX + key: value for key, value in found.items()}


def find_preprocessing(
    model: nn.Module,
    preprocessing: dict[str, Any] | None = None,
    *,
    fixed_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the published preprocessing of a model, updated with known entries and a fixed size."""
    found = default_preprocessing(_module_with_cfg(model)) | (preprocessing or {})
    if fixed_size is not None:
        found["input_size"] = [count_channels(model, found), *fixed_size]
    return found


def count_channels(model: nn.Module, preprocessing: dict[str, Any]) -> int:
    """Return the number of input channels of a model: those of its first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return int(preprocessing.get("input_size", (3,))[0] if first is None else first.in_channels)


def model_name(model: nn.Module) -> str:
    """Return the name that a model was created by, or the name of its architecture or class."""
    init_args: Any = getattr(model, "init_args", None)
    if init_args:
        return str(init_args["name"])
    cfg: Any = getattr(_module_with_cfg(model), "pretrained_cfg", None) or {}
    return own_name(str(cfg.get("architecture") or type(model).__name__))


def source_commit() -> str | None:
    """Return the git commit of the installed or checked-out library, or `None` for a released wheel."""
    try:
        record = distribution("lightspine").read_text("direct_url.json")
    except PackageNotFoundError:
        record = None
    installed = json.loads(record).get("vcs_info", {}).get("commit_id") if record else None
    return installed or _checked_out_commit(Path(__file__).parents[3] / ".git")


def _checked_out_commit(git: Path) -> str | None:
    if not (git / "HEAD").is_file():
        return None
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    reference = head.removeprefix("ref: ")
    if (git / reference).is_file():
        return (git / reference).read_text().strip()
    packed = git / "packed-refs"
    found = (
        re.search(rf"^(\w+) {re.escape(reference)}$", packed.read_text(), re.M) if packed.is_file() else None
    )
    return found[1] if found else None


def _module_with_cfg(model: nn.Module) -> nn.Module:
    """Return the first submodule that has a timm pretrained_cfg, or the model itself."""
    for module in model.modules():
        if getattr(module, "pretrained_cfg", None):
            return module
    return model
