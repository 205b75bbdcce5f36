"""`export_pt2`: a model as a program of `torch.export`."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.errors import LightspineError, UsageError
from lightspine.export.check import TOLERANCES, compare, random_batches
from lightspine.export.metadata import Description
from lightspine.export.onnx_file import ExportReport, check_writable, count_channels, describe
from lightspine.export.program import check_size, example_input, trace
from lightspine.export.targets import find_target
from lightspine.ops.onnx import ScanForm, scan_table
from lightspine.optimize import optimize
from lightspine.utils.files import atomic_write

METADATA = "lightspine.json"
"""The entry of the file that says what it is."""


def export_pt2(
    model: nn.Module,
    path: str | Path,
    *,
    scan: ScanForm | None = None,
    fixed_size: tuple[int, int] | None = None,
    shapes: list[tuple[int, int, int]] | None = None,
) -> ExportReport:
    """Write a model as a program of `torch.export`, compared with the model.

    `torch.export.load(path).module()` runs it. A scan is one operator of lightspine there, so that VMamba's
    or Vim's program needs `import lightspine` first; unrolled it needs nothing but PyTorch.

    Args:
        model: as for `lightspine.export.export_onnx`.
        path: the file to write; its name ends in .pt2.
        scan: "unrolled" writes the scans' steps out, which needs `fixed_size`; by default they stay as they
            are.
        fixed_size: (height, width), the only one that the program takes.
        shapes: (images, height, width) to compare at.

    Returns:
        What was written.

    Raises:
        UsageError: a model in training mode, another name, options that exclude each other.
        LightspineError: the model cannot be traced, the file cannot be written or gives other values.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise UsageError(f"expected a file name that ends in .pt2, got {path.name!r}")
    if scan == "loop":
        raise UsageError(
            "a .pt2 file keeps scans as operators or has them unrolled, it has no loops: got loop"
        )
    if scan == "unrolled" and fixed_size is None:
        raise UsageError("an unrolled scan has as many steps as the image has patches: expected a fixed size")
    check_size(fixed_size)
    check_writable(path)
    target = find_target(model)
    if any(module.training for module in model.modules()):
        raise UsageError("expected a model in evaluation mode (model.eval()), got one in training mode")
    description: Description = describe(model, target, fixed_size=fixed_size)
    channels = count_channels(model, description.preprocessing)
    program = trace(
        optimize(target.network), example_input(channels, fixed_size, False), fixed=fixed_size is not None
    )
    if scan == "unrolled":
        program = program.run_decompositions(scan_table("unrolled"))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: description.to_json()})
    run: Callable[[Tensor], Any] = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    tried = (
        [(count, *fixed_size) for count in (1, 3)] if fixed_size else shapes or [(1, 224, 224), (3, 97, 161)]
    )
    differences = compare(target.network, run, random_batches(channels, tried))
    worst = max(found.relative for found in differences)
    if not worst <= TOLERANCES["fp32"]:
        raise LightspineError(
            f"the exported program differs from the model by {worst:.1e}: no file was written"
        )
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
