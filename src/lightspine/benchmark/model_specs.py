"""Models of a benchmark: name parsing, evaluation size and construction."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg

from lightspine.benchmark.efficientmod_official import OfficialEfficientMod
from lightspine.benchmark.results import PublishedFigures, Source
from lightspine.errors import UsageError
from lightspine.models import find_record
from lightspine.models.checkpoint import read_checkpoint
from lightspine.models.factory import describe_model
from lightspine.models.loading import fetch_published, is_published, load_checkpoint
from lightspine.models.registry import TIMM_PREFIX as TIMM_PREFIX
from lightspine.models.registry import timm_name

OFFICIAL_PREFIX = "official/"
"""Prefix for EfficientMod with the operation order of the official code, as a baseline."""

MIN_SIZE = 32
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


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
        checkpoint: file with the weights; `None` for random ones.
        size: (height, width) of the evaluation in pixels; `None` for the authors'.
        published: the authors' figures.
        absent: why the model cannot be measured; `None` if it can.
    """

    name: str
    source: Source
    variant: str | None = None
    note: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    scan_backend: str | None = None
    checkpoint: str | None = None
    size: tuple[int, int] | None = None
    published: PublishedFigures | None = None
    absent: str | None = None


def parse_model(text: str) -> ModelSpec:
    """Parse the name of a model or a checkpoint.

    `NAME` is a model of lightspine, `timm/NAME` one of timm and `official/NAME` a baseline.
    A name without prefix that only timm has is a model of timm. A checkpoint, a file or published weights by
    name (`vmamba_tiny.in1k`), is measured with its own arguments and weights, by default at its own image
    size.

    Raises:
        UsageError: the model is unknown.
        LightspineError: the file cannot be downloaded or read, or fits no registered model.
    """
    if text.startswith(OFFICIAL_PREFIX):
        record = find_record(text.removeprefix(OFFICIAL_PREFIX))
        if record is None or record.family != "efficientmod":
            raise UsageError(f"expected {OFFICIAL_PREFIX}efficientmod_*, the only baselines, got {text!r}")
        return ModelSpec(name=text, source="lightspine", note="operation order of the official code")
    if Path(text).is_file():
        return _spec_of_file(Path(text), Path(text).name)
    if is_published(text):
        return _spec_of_file(fetch_published(text).path, text)
    if Path(text).suffix in CHECKPOINT_SUFFIXES:
        raise UsageError(f"expected a model name or a checkpoint file, but {text} does not exist")
    theirs = timm_name(text)
    if theirs is None:
        return ModelSpec(name=text, source="lightspine")
    return ModelSpec(name=theirs, source="timm")


def _spec_of_file(path: Path, variant: str) -> ModelSpec:
    file = read_checkpoint(path)
    metadata = describe_model(file)
    theirs = timm_name(metadata.name)
    size = metadata.preprocessing.get("input_size")
    return ModelSpec(
        name=theirs or metadata.name,
        source="timm" if theirs else "lightspine",
        variant=variant,
        note=f"weights of {path}",
        kwargs=metadata.kwargs,
        checkpoint=str(path),
        size=None if size is None else (size[1], size[2]),
    )


def evaluation_size(spec: ModelSpec) -> tuple[int, int]:
    """Return the (height, width) in pixels at which a model is evaluated, by its file or else its authors."""
    if spec.size is not None:
        return spec.size
    record = find_record(spec.name.removeprefix(OFFICIAL_PREFIX))
    if spec.source == "lightspine" and record is not None:
        return record.input_size[1], record.input_size[2]
    size = _timm_cfg(spec).input_size
    return size[1], size[2]


def build_model(spec: ModelSpec, height: int, width: int) -> nn.Module:
    """Create a model in eval mode on the CPU, with the weights of its file or else random ones.

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
    if spec.checkpoint is not None:
        load_checkpoint(model, spec.checkpoint, drop_head=False)
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
