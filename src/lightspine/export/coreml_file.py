"""`export_coreml`: a model as a Core ML package; conversion only, which is all that can be done off a Mac."""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lightspine.errors import LightspineError, UsageError
from lightspine.export.onnx_file import ExportReport, count_channels, describe
from lightspine.export.program import check_size, example_input, trace
from lightspine.export.targets import find_target
from lightspine.ops.onnx import scan_table
from lightspine.optimize import optimize


def export_coreml(
    model: nn.Module, path: str | Path, *, fixed_size: tuple[int, int] | None = None
) -> ExportReport:
    """Write a model as a Core ML package for one image of a fixed size, its scans unrolled.

    The package is not run: Core ML predicts on a Mac only.

    Args:
        model: as for `lightspine.export.export_onnx`.
        path: the package to write; its name ends in .mlpackage.
        fixed_size: (height, width) of the images.

    Returns:
        What was written, without differences.

    Raises:
        UsageError: no fixed size, another name, a model in training mode.
        LightspineError: coremltools is missing or refuses the model.
    """
    path = Path(path)
    if path.suffix != ".mlpackage":
        raise UsageError(f"expected a name that ends in .mlpackage, got {path.name!r}")
    if fixed_size is None:
        raise UsageError(
            "Core ML needs a fixed size of the images: expected fixed_size (--fixed-size HxW), got none"
        )
    check_size(fixed_size)
    target = find_target(model)
    if any(module.training for module in model.modules()):
        raise UsageError("expected a model in evaluation mode (model.eval()), got one in training mode")
    if importlib.util.find_spec("coremltools") is None:
        raise LightspineError(
            "an export to Core ML needs coremltools, which is not installed: pip install coremltools"
        )
    import coremltools

    description = describe(model, target, fixed_size=fixed_size)
    images = example_input(count_channels(model, description.preprocessing), fixed_size, False)
    # Its converter knows no unbind of a tensor with a free axis: one image at a time.
    program = trace(optimize(target.network), images[:1], fixed=True, fixed_batch=True)
    # It knows no alias either, which is all that a map of the same size may be.
    aliases = {torch.ops.aten.alias.default: torch.clone}
    program = program.run_decompositions(scan_table("unrolled") | aliases)
    try:
        package: Any = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17)
    except Exception as error:
        raise LightspineError(f"coremltools cannot convert this model: {error}") from error
    for key, value in description.entries().items():
        package.user_defined_metadata[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        package.save(str(Path(folder) / path.name))
        shutil.rmtree(path, ignore_errors=True)
        (Path(folder) / path.name).rename(path)
    return ExportReport(
        path=path,
        bytes=sum(part.stat().st_size for part in path.rglob("*") if part.is_file()),
        weight_bytes=sum(p.numel() * p.element_size() for p in target.network.parameters()),
        nodes=sum(node.op == "call_function" for node in program.graph.nodes),
    )
