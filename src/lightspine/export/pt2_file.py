"""Export to a `torch.export` program (.pt2)."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.export.metadata import ExportMetadata, count_channels, find_preprocessing, model_name
from lightspine.export.program import check_fixed_size, example_input, find_target, trace
from lightspine.export.verification import (
    TOLERANCES,
    ExportReport,
    check_differences,
    compare,
    random_batches,
)
from lightspine.ops.onnx import ScanForm, scan_table
from lightspine.optimize import optimize
from lightspine.utils.files import atomic_write, check_writable
from lightspine.utils.resource_errors import resource_errors

METADATA_FILE = "lightspine.json"
"""Name of the extra file with the metadata inside the .pt2 archive."""


@resource_errors()
def export_pt2(
    model: nn.Module,
    path: str | Path,
    *,
    scan: ScanForm | None = None,
    fixed_size: tuple[int, int] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: dict[str, Any] | None = None,
    source: dict[str, str] | None = None,
    checkpoint: Mapping[str, str] | None = None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
) -> ExportReport:
    """Export a model to a `torch.export` program (.pt2) and compare it with the model.

    `torch.export.load(path).module()` loads it. Scans remain custom operators of lightspine, so a program of
    VMamba or Vim needs `import lightspine` first; unrolled scans need only PyTorch.

    Args:
        model: see `lightspine.export.export_onnx`.
        path: the file to write; its name ends in .pt2.
        scan: "unrolled" writes every step of the scans as an operator, which needs `fixed_size`; by default
            scans remain custom operators.
        fixed_size: (height, width) if the program shall take one size only.
        class_names: see `lightspine.export.export_onnx`.
        preprocessing: see `lightspine.export.export_onnx`.
        source: see `lightspine.export.export_onnx`.
        checkpoint: see `lightspine.export.export_onnx`.
        shapes: (batch, height, width) to compare at.

    Raises:
        UsageError: the model is in training mode, or options contradict each other.
        LightspineError: the model cannot be traced, or the file cannot be written or differs from the model.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise UsageError(f"expected a file name that ends in .pt2, got {path.name!r}")
    if scan not in (None, "unrolled"):
        raise UsageError(f"the scans of a .pt2 file are operators or unrolled, got {scan}")
    if scan == "unrolled" and fixed_size is None:
        raise UsageError("an unrolled scan has one step per patch of the image: expected a fixed size")
    check_fixed_size(fixed_size)
    check_writable(path)
    target = find_target(model)
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
    channels = count_channels(model, preprocessing)
    program = trace(
        optimize(target.network), example_input(channels, fixed_size, False), fixed=fixed_size is not None
    )
    if scan == "unrolled":
        program = program.run_decompositions(scan_table("unrolled"))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: metadata.to_json()})
    run: Callable[[Tensor], Any] = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    fixed_shapes = None if fixed_size is None else [(count, *fixed_size) for count in (1, 3)]
    batches = random_batches(channels, fixed_shapes or shapes or [(1, 224, 224), (3, 97, 161)])
    try:
        differences = compare(target.network, run, batches)
    # PyTorch checks the sizes for which the program is valid with assertions.
    except AssertionError as error:
        raise LightspineError(
            f"the program of {metadata.name} does not take images of all sizes ({error}): pass fixed_size "
            "(--fixed-size HxW)"
        ) from error
    check_differences(differences, TOLERANCES["fp32"], metadata.name)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return ExportReport(
        path=path,
        bytes=len(buffer.getvalue()),
        weight_bytes=sum(p.numel() * p.element_size() for p in target.network.parameters()),
        nodes=sum(node.op == "call_function" for node in program.graph.nodes),
        differences=differences,
        tolerance=TOLERANCES["fp32"],
    )
