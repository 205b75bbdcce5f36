"""Which models a benchmark measures, and how they are built."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg

from lightspine.benchmark.baselines.efficientmod_official import OfficialEfficientMod
from lightspine.benchmark.results import PublishedFigures, Source
from lightspine.errors import UsageError
from lightspine.models import find_record
from lightspine.models.registry import unknown_model

TIMM_PREFIX = "timm/"
OFFICIAL_PREFIX = "official/"
"""Our weights in the official order of steps, in plain PyTorch; of EfficientMod only."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model of a table.

    Attributes:
        name: registered name.
        source: whose implementation.
        variant: which of several configurations of the model.
        note: what it is where the name does not say it all.
        kwargs: arguments of its constructor.
        scan_backend: computes the scans of ours; `None` for the usual choice by device.
        published: the authors' figures.
        absent: why it cannot be measured; `None` for a model that can.
    """

    name: str
    source: Source
    variant: str | None = None
    note: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    scan_backend: str | None = None
    published: PublishedFigures | None = None
    absent: str | None = None


def parse_model(text: str) -> ModelSpec:
    """Return the model that a name means: ours first, `timm/NAME` for timm's, `official/NAME` for a baseline.

    Raises:
        UsageError: none has it.
    """
    if text.startswith(OFFICIAL_PREFIX):
        record = find_record(text.removeprefix(OFFICIAL_PREFIX))
        if record is None or record.family != "efficientmod":
            raise UsageError(f"expected {OFFICIAL_PREFIX}efficientmod_*, the only baselines, got {text!r}")
        return ModelSpec(name=text, source="lightspine", note="official order of steps, plain PyTorch")
    name = text.removeprefix(TIMM_PREFIX)
    if not text.startswith(TIMM_PREFIX) and find_record(name) is not None:
        return ModelSpec(name=name, source="lightspine")
    if not timm.is_model(name):
        raise unknown_model(name)
    if timm.model_entrypoint(name).__module__.startswith("lightspine"):
        raise UsageError(
            f"timm has no model {name!r} of its own: ours is called {name}, without {TIMM_PREFIX}"
        )
    return ModelSpec(name=name, source="timm")


def own_size(spec: ModelSpec) -> tuple[int, int]:
    """Return the (height, width) in pixels that a model is evaluated at by its authors."""
    record = find_record(spec.name.removeprefix(OFFICIAL_PREFIX))
    if spec.source == "lightspine" and record is not None:
        return record.input_size[1], record.input_size[2]
    size = _timm_cfg(spec).input_size
    return size[1], size[2]


def _timm_cfg(spec: ModelSpec) -> PretrainedCfg:
    cfg = timm.get_pretrained_cfg(spec.name)
    # Only a name without an entry has none, and such a name was refused.
    assert cfg is not None
    return cfg


def build_model(spec: ModelSpec, height: int, width: int) -> nn.Module:
    """Create a model with random weights for images of one size, in evaluation mode, on the CPU.

    Models whose weights depend on the image's size (DeiT, Swin, Vim) are built for it, so that none has to
    resize a table in its forward pass.

    Raises:
        UsageError: fewer than 32 pixels.
        Exception: whatever a model of timm raises for a size that it cannot take.
    """
    if min(height, width) < 32:
        raise UsageError(f"a model takes images of at least 32 x 32 pixels, got {height} x {width}")
    # The same weights in each process, though no measurement depends on them.
    torch.manual_seed(0)
    kwargs = dict(spec.kwargs)
    if spec.source == "lightspine":
        record = find_record(spec.name.removeprefix(OFFICIAL_PREFIX))
        assert record is not None
        if record.family == "vim":
            kwargs["img_size"] = (height, width)
        model = record.create(**kwargs)
        if spec.name.startswith(OFFICIAL_PREFIX):
            model = OfficialEfficientMod(model)
    else:
        if _timm_cfg(spec).fixed_input_size and (height, width) != own_size(spec):
            kwargs["img_size"] = (height, width)
        model = timm.create_model(spec.name, **kwargs)
    return model.eval()
