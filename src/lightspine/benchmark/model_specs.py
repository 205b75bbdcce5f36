"""Models of a benchmark: name parsing, evaluation size and construction."""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg

from lightspine.benchmark.efficientmod_official import OfficialEfficientMod
from lightspine.benchmark.results import PublishedFigures, Source
from lightspine.errors import UsageError
from lightspine.models import find_record
from lightspine.models.registry import unknown_model

TIMM_PREFIX = "timm/"
OFFICIAL_PREFIX = "official/"
"""Prefix for EfficientMod with the operation order of the official code, as a baseline."""

MIN_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model of a benchmark.

    Attributes:
        name: registered name.
        source: "lightspine" or "timm".
        variant: name of a configuration that differs from the registered one.
        note: description of a model whose name is not self-explanatory.
        kwargs: arguments of the constructor.
        scan_backend: backend of all scans; `None` selects the default of the device.
        published: the authors' figures.
        absent: why the model cannot be measured; `None` if it can.
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
    """Parse a model name: `NAME` of lightspine, `timm/NAME` of timm, or `official/NAME` of a baseline.

    A name without prefix that only timm has is a model of timm.

    Raises:
        UsageError: the model is unknown.
    """
    if text.startswith(OFFICIAL_PREFIX):
        record = find_record(text.removeprefix(OFFICIAL_PREFIX))
        if record is None or record.family != "efficientmod":
            raise UsageError(f"expected {OFFICIAL_PREFIX}efficientmod_*, the only baselines, got {text!r}")
        return ModelSpec(name=text, source="lightspine", note="operation order of the official code")
    name = text.removeprefix(TIMM_PREFIX)
    if not text.startswith(TIMM_PREFIX) and find_record(name) is not None:
        return ModelSpec(name=name, source="lightspine")
    if not timm.is_model(name):
        raise unknown_model(name)
    if timm.model_entrypoint(name).__module__.startswith("lightspine"):
        raise UsageError(f"timm has no model {name!r} of its own: use {name} without {TIMM_PREFIX}")
    return ModelSpec(name=name, source="timm")


def evaluation_size(spec: ModelSpec) -> tuple[int, int]:
    """Return the (height, width) in pixels at which the authors evaluate a model."""
    record = find_record(spec.name.removeprefix(OFFICIAL_PREFIX))
    if spec.source == "lightspine" and record is not None:
        return record.input_size[1], record.input_size[2]
    size = _timm_cfg(spec).input_size
    return size[1], size[2]


def build_model(spec: ModelSpec, height: int, width: int) -> nn.Module:
    """Create a model with random weights in eval mode on the CPU.

    Models with position embeddings or bias tables (DeiT, Swin, Vim) are built for the given size, so that
    none of them resizes a table in its forward pass.

    Raises:
        UsageError: a side is shorter than 32 pixels.
        Exception: any error of a timm model that does not support the size.
    """
    check_image_size(height, width)
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
        if _timm_cfg(spec).fixed_input_size and (height, width) != evaluation_size(spec):
            kwargs["img_size"] = (height, width)
        model = timm.create_model(spec.name, **kwargs)
    return model.eval()


def check_image_size(height: int, width: int) -> None:
    """Check that an image size is large enough for every model.

    Raises:
        UsageError: a side is shorter than 32 pixels.
    """
    if min(height, width) < MIN_SIZE:
        raise UsageError(
            f"expected images of at least {MIN_SIZE} x {MIN_SIZE} pixels, got {height} x {width}"
        )


def _timm_cfg(spec: ModelSpec) -> PretrainedCfg:
    cfg = timm.get_pretrained_cfg(spec.name)
    # `parse_model` has rejected names without a configuration.
    assert cfg is not None
    return cfg
