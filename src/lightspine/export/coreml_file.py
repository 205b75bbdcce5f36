"""Export to Core ML, without a comparison with PyTorch, because Core ML runs on macOS only."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lightspine.errors import LightspineError, UsageError
from lightspine.export.metadata import ExportMetadata, count_channels, find_preprocessing, model_name
from lightspine.export.program import check_fixed_size, example_input, find_target, trace
from lightspine.export.verification import ExportReport
from lightspine.ops.onnx import scan_table
from lightspine.optimize import optimize
from lightspine.utils.files import atomic_folder


def export_coreml(
    model: nn.Module,
    path: str | Path,
    *,
    fixed_size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    source: dict[str, str] | None = None,
    checkpoint: Mapping[str, str] | None = None,
) -> ExportReport:
    """Export a model to a Core ML package for one image of a fixed size, with unrolled scans.

    The package is not compared with PyTorch, because Core ML runs on macOS only.

    Args:
        model: see `lightspine.export.export_onnx`.
        path: the package to write; its name ends in .mlpackage.
        fixed_size: (height, width) of the images.
        class_names: see `lightspine.export.export_onnx`.
        preprocessing: see `lightspine.export.export_onnx`.
        source: see `lightspine.export.export_onnx`.
        checkpoint: see `lightspine.export.export_onnx`.

    Raises:
        UsageError: there is no fixed size, or the model is in training mode.
        LightspineError: coremltools is missing, or cannot convert the model.
    """
    path = Path(path)
    if path.suffix != ".mlpackage":
        raise UsageError(f"expected a name that ends in .mlpackage, got {path.name!r}")
    if fixed_size is None:
        raise UsageError("an export to Core ML needs fixed_size (--fixed-size HxW), got none")
    check_fixed_size(fixed_size)
    target = find_target(model)
    if importlib.util.find_spec("coremltools") is None:
        raise LightspineError(
            "an export to Core ML needs coremltools, which is not installed: pip install coremltools"
        )
    import coremltools

    preprocessing = find_preprocessing(model, preprocessing, fixed_size=fixed_size)
    metadata = ExportMetadata(
        name=model_name(model),
        kind=target.kind,
        strides=target.strides,
        class_names=None if class_names is None else list(class_names),
        preprocessing=preprocessing,
        source=source or {},
        checkpoint=dict(checkpoint or {}),
    )
    images = example_input(count_channels(model, preprocessing), fixed_size, False)
    # coremltools cannot convert the unbind of a tensor with a dynamic axis: fix the batch size to one.
    program = trace(optimize(target.network), images[:1], fixed=True, fixed_batch=True)
    # Nor can it convert aten.alias, to which an interpolation to the same size decomposes.
    aliases = {torch.ops.aten.alias.default: torch.clone}
    program = program.run_decompositions(scan_table("unrolled") | aliases)
    try:
        package: Any = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17)
    except Exception as error:
        raise LightspineError(f"coremltools cannot convert this model: {error}") from error
    for key, value in metadata.entries().items():
        package.user_defined_metadata[key] = value
    with atomic_folder(path) as folder:
        package.save(str(folder))
    return ExportReport(
        path=path,
        bytes=sum(part.stat().st_size for part in path.rglob("*") if part.is_file()),
        weight_bytes=sum(p.numel() * p.element_size() for p in target.network.parameters()),
        nodes=sum(node.op == "call_function" for node in program.graph.nodes),
    )
