"""`export_onnx`: a model as an ONNX file that was compared with PyTorch before it got its name."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn as nn

from lightspine.errors import LightspineError, UsageError
from lightspine.export.check import (
    CHECKED,
    TOLERANCES,
    Difference,
    compare,
    open_session,
    random_batches,
    session_function,
)
from lightspine.export.metadata import Description
from lightspine.export.onnx_graph import check_opset, to_onnx, write_scans_out
from lightspine.export.precision import list_calibration_images, prepared_batches, quantise, to_half
from lightspine.export.program import check_size, example_input, trace
from lightspine.export.targets import Target, WithPreprocessing, find_target
from lightspine.models.checkpoint import default_preprocessing
from lightspine.ops.onnx import ScanForm
from lightspine.optimize import optimize
from lightspine.utils.files import atomic_write

Precision = Literal["fp32", "fp16", "int8-dynamic", "int8-static"]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        weight_bytes: what the parameters of the model take in PyTorch.
        nodes: operators in the graph.
        differences: from PyTorch, one per size of image that was tried.
        tolerance: largest relative difference that is let through.
    """

    path: Path
    bytes: int
    weight_bytes: int
    nodes: int
    differences: list[Difference] = field(default_factory=list)
    tolerance: float = 0.0


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    opset: int = 20,
    precision: Precision = "fp32",
    calibration: str | Path | None = None,
    scan: ScanForm = "loop",
    with_preprocessing: bool = False,
    fixed_size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    source: dict[str, str] | None = None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
) -> ExportReport:
    """Write a model as an ONNX file and compare it with PyTorch in ONNX Runtime.

    The file holds the optimised network (`lightspine.optimize`) in standard operators, for any number of
    images and, unless `fixed_size` is given, any height and width from 32 px up. It says what its classes are
    called and how its images are prepared, so that `lightspine_runtime` needs nothing else.

    Args:
        model: a classifier, a `features_only` model, a detector (its backbone and pyramid are written) or a
            segmenter, float32, on the CPU, in evaluation mode; it stays as it is.
        path: the file to write; a file of that name is replaced when the new one is complete and right.
        opset: version of the ONNX operators, see `lightspine.export.onnx_graph.OPSETS`.
        precision: "fp32"; "fp16" (weights and sums but those of the scans); "int8-dynamic" (weights and
            matrix products in 8 bit); "int8-static" (convolutions and activations too).
        calibration: a folder of images, at any depth, for "int8-static".
        scan: "loop", or "unrolled" for programs without loops, which needs `fixed_size`.
        with_preprocessing: the file takes 8-bit pixels (B, H, W, 3) and normalises them itself; to resize and
            crop stays with the caller.
        fixed_size: (height, width), the only one that the file takes.
        class_names: one per class.
        preprocessing: see `lightspine.export.metadata.Description`; as published by default.
        source: what the weights were read from, for the file's metadata.
        shapes: (images, height, width) to compare at; some usual and unusual ones by default. With
            "int8-static" the images to calibrate with are compared, at their own size.

    Returns:
        What was written.

    Raises:
        UsageError: a model in training mode, options that exclude each other, an opset that cannot carry the
            model.
        LightspineError: onnx, onnxscript or onnxruntime is missing, the model cannot be traced, the file
            cannot be written or gives other values than PyTorch; no file is left then.
    """
    path = Path(path)
    _check_options(path, precision, calibration, scan, fixed_size, opset)
    check_installed("onnx", "onnxscript", "onnxruntime")
    images_to_measure = None if calibration is None else list_calibration_images(Path(calibration))
    target = find_target(model)
    if any(module.training for module in model.modules()):
        raise UsageError(
            "expected a model in evaluation mode (model.eval()) to export, got one in training mode"
        )
    preparation = default_preprocessing(_with_cfg(model)) | (preprocessing or {})
    network = target.network
    channels = count_channels(model, preparation)
    if fixed_size is not None:
        preparation["input_size"] = [channels, *fixed_size]
    if with_preprocessing:
        network = WithPreprocessing(network, tuple(preparation["mean"]), tuple(preparation["std"]))
    images = example_input(channels, fixed_size, with_preprocessing)
    size: tuple[str | int, str | int] = fixed_size or ("height", "width")
    onnx_model = to_onnx(
        trace(optimize(network), images, fixed=fixed_size is not None),
        opset=opset,
        scan=scan,
        input_name="pixels" if with_preprocessing else "images",
        input_axes=("batch", *size, channels) if with_preprocessing else ("batch", channels, *size),
        output_names=target.outputs,
    )
    if precision == "fp16":
        onnx_model = to_half(onnx_model)
    onnx_model = write_scans_out(onnx_model, opset)
    if precision.startswith("int8"):
        onnx_model = quantise(onnx_model, images_to_measure, preparation, with_preprocessing)
    description = describe(
        model,
        target,
        fixed_size=fixed_size,
        class_names=None if class_names is None else list(class_names),
        preprocessing=preparation,
        pixels=with_preprocessing,
        precision=precision,
        source=source or {},
    )
    for key, value in description.entries().items():
        onnx_model.metadata_props.add(key=key, value=value)
    if fixed_size is not None:
        tried: Sequence[tuple[int, int, int]] = [(count, *fixed_size) for count in (1, 3)]
    else:
        tried = shapes or CHECKED
    content = onnx_model.SerializeToString()
    if images_to_measure is None:
        batches = random_batches(channels, tried, pixels=with_preprocessing)
    else:
        # What lies outside the measured ranges is cut off: random images would be.
        batches = prepared_batches(images_to_measure, preparation, with_preprocessing)
    differences = compare(network, session_function(open_session(content)), batches)
    worst = max(differences, key=lambda found: found.relative)
    if not worst.relative <= TOLERANCES[precision]:
        raise LightspineError(
            f"the exported {description.name} differs from PyTorch by {worst.relative:.1e} at {worst.shape}, "
            f"more than {TOLERANCES[precision]:.0e}: no file was written"
        )
    with atomic_write(path) as file:
        file.write(content)
    return ExportReport(
        path=path,
        bytes=len(content),
        weight_bytes=sum(p.numel() * p.element_size() for p in target.network.parameters()),
        nodes=len(onnx_model.graph.node),
        differences=differences,
        tolerance=TOLERANCES[precision],
    )


def describe(
    model: nn.Module, target: Target, *, fixed_size: tuple[int, int] | None = None, **known: Any
) -> Description:
    """Return what a file says about itself, as published where it is not known better."""
    preprocessing = default_preprocessing(_with_cfg(model)) | (known.pop("preprocessing", None) or {})
    if fixed_size is not None:
        preprocessing["input_size"] = [count_channels(model, preprocessing), *fixed_size]
    name = _name_of(model)
    return Description(
        name=name, kind=target.kind, strides=target.strides, preprocessing=preprocessing, **known
    )


def check_installed(*packages: str) -> None:
    """Refuse to go on without packages that an export needs.

    Raises:
        LightspineError: one of them is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise LightspineError(
                f"an export needs {package}, which is not installed: pip install 'lightspine[export]'"
            )


def check_writable(path: Path) -> None:
    """Refuse a path that nothing can be written to, before the work is done.

    Raises:
        UsageError: it is a folder.
        LightspineError: its folder cannot be made or written to.
    """
    if path.is_dir():
        raise UsageError(f"expected a file to write, got the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(handle)
    Path(part).unlink()


def count_channels(model: nn.Module, preparation: dict[str, Any]) -> int:
    """Return the number of channels that a model takes: those of its first convolution."""
    first = next((m for m in model.modules() if isinstance(m, torch.nn.Conv2d)), None)
    return int(preparation.get("input_size", (3,))[0] if first is None else first.in_channels)


def _check_options(
    path: Path,
    precision: str,
    calibration: str | Path | None,
    scan: str,
    fixed_size: tuple[int, int] | None,
    opset: int,
) -> None:
    if path.suffix != ".onnx":
        raise UsageError(f"expected a file name that ends in .onnx, got {path.name!r}")
    if precision not in get_args(Precision):
        raise UsageError(f"expected a precision of {', '.join(get_args(Precision))}, got {precision!r}")
    if scan not in get_args(ScanForm):
        raise UsageError(f"expected a scan of {', '.join(get_args(ScanForm))}, got {scan!r}")
    if scan == "unrolled" and fixed_size is None:
        raise UsageError("an unrolled scan has as many steps as the image has patches: expected a fixed size")
    if precision == "int8-static" and calibration is None:
        raise UsageError(
            "int8-static measures the activations on images: expected a folder of them to calibrate with"
        )
    if precision != "int8-static" and calibration is not None:
        raise UsageError(f"images to calibrate with belong to int8-static, got them with {precision}")
    check_opset(opset)
    check_size(fixed_size)
    check_writable(path)


def _with_cfg(model: nn.Module) -> nn.Module:
    """Return the part of a network that has a pretrained cfg."""
    for module in model.modules():
        if getattr(module, "pretrained_cfg", None):
            return module
    return model


def _name_of(model: nn.Module) -> str:
    init_args: Any = getattr(model, "init_args", None)
    if init_args:
        return str(init_args["name"])
    cfg: Any = getattr(_with_cfg(model), "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
