"""Conversion of a traced program to an ONNX model of standard operators."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lightspine.errors import LightspineError, UsageError
from lightspine.export.onnx_cleanup import remove_no_ops, remove_unused, to_clean_proto
from lightspine.ops.onnx import FUNCTION_DOMAIN, ScanForm, scan_function, scan_table

OPSETS = range(18, 27)
"""Versions of the ONNX operator set that PyTorch writes and ONNX Runtime reads."""


def check_opset(opset: int) -> None:
    """Check that a version of the ONNX operator set is supported.

    Raises:
        UsageError: it is not in `OPSETS`.
    """
    if opset not in OPSETS:
        raise UsageError(f"expected an opset from {OPSETS.start} to {OPSETS.stop - 1}, got {opset}")


def to_onnx(
    program: ExportedProgram,
    *,
    opset: int,
    scan: ScanForm,
    inputs: Mapping[str, Sequence[str | int]],
    output_names: Sequence[str],
) -> Any:
    """Convert a program to an `onnx.ModelProto` in which each scan loop is a function call.

    Args:
        program: from `lightspine.export.program.trace`.
        opset: see `OPSETS`.
        scan: see `lightspine.ops.onnx.scan_table`.
        inputs: name of each input -> the name of each of its dynamic axes and the size of each fixed one.
        output_names: names of the outputs.

    Raises:
        LightspineError: the opset lacks an operator of the model.
    """
    level = logging.getLogger("torch.onnx").level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The exporter logs every decomposition.
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            table = scan_table(scan) | _POOLING_TABLE
            # Running a table traces the program anew, which takes minutes for a detector.
            if any(node.target in table for node in program.graph.nodes):
                program = program.run_decompositions(table)
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=list(inputs),
                output_names=list(output_names),
            )
    except UsageError:
        raise
    except Exception as error:
        raise LightspineError(f"cannot export this model to opset {opset}: {_root_cause(error)}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    remove_no_ops(exported.model)
    model = to_clean_proto(exported.model)
    for value, axes in zip(model.graph.input, inputs.values(), strict=True):
        for dimension, axis in zip(value.type.tensor_type.shape.dim, axes, strict=True):
            if isinstance(axis, str):
                dimension.dim_param = axis
            else:
                dimension.dim_value = axis
    return model


def define_scans(model: Any, opset: int, *, inline: bool) -> Any:
    """Define the scan functions that a model calls, or replace the calls by standard operators.

    A function of the model (domain "lightspine") has a body of standard operators. ONNX Runtime runs the
    body, or an operator that is registered under the same name.

    Args:
        model: from `to_onnx`.
        opset: the opset that the model was exported to.
        inline: replace the calls, for runtimes without functions.
    """
    import onnx
    import onnx.inliner

    called = sorted({node.op_type for node in model.graph.node if node.domain == FUNCTION_DOMAIN})
    if called:
        model.functions.extend(scan_function(name, opset) for name in called)
        if FUNCTION_DOMAIN not in {entry.domain for entry in model.opset_import}:
            model.opset_import.append(onnx.helper.make_opsetid(FUNCTION_DOMAIN, 1))
    return remove_unused(onnx.inliner.inline_local_functions(model) if inline else model)


def _root_cause(error: BaseException) -> str:
    # PyTorch wraps the cause in long advice.
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def _adaptive_average_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Adaptive average pooling as two matrix products, for dynamic sizes.

    PyTorch's exporter stores the windows of the traced size as constants, which are wrong for other sizes.
    """
    rows, columns = (
        _pooling_weights(length, count, x) for length, count in zip(x.shape[2:], output_size, strict=True)
    )
    return rows @ x @ columns.t()


def _pooling_weights(length: int, count: int, like: Tensor) -> Tensor:
    """Return the weight of each position in each of the (overlapping) windows, (count, length).

    The length may be a symbol of the tracer.
    """
    window = torch.arange(count, device=like.device).unsqueeze(1)
    starts = window * length // count
    ends = ((window + 1) * length + count - 1) // count
    positions = torch.arange(length, device=like.device)
    inside = torch.logical_and(positions >= starts, positions < ends)
    return inside.to(like.dtype) / (ends - starts).to(like.dtype)


_POOLING_TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_average_pool
}
