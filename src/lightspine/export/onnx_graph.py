"""From a traced program to an ONNX model of standard operators."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from lightspine.errors import LightspineError, UsageError
from lightspine.export.onnx_tidying import drop_neutral, drop_unused
from lightspine.export.pooling_form import pooling_table
from lightspine.ops.onnx import FUNCTION_DOMAIN, ScanForm, scan_function, scan_table

OPSETS = range(18, 27)
"""Versions of the ONNX operators that PyTorch writes and ONNX Runtime reads."""


def check_opset(opset: int) -> None:
    """Refuse a version of the ONNX operators that cannot be written.

    Raises:
        UsageError: it is none of `OPSETS`.
    """
    if opset not in OPSETS:
        raise UsageError(
            f"expected an opset from {OPSETS.start} to {OPSETS.stop - 1}, which has the operators of these "
            f"models and runs in ONNX Runtime, got {opset}"
        )


def to_onnx(
    program: ExportedProgram,
    *,
    opset: int,
    scan: ScanForm,
    input_name: str,
    input_axes: Sequence[str | int],
    output_names: Sequence[str],
) -> Any:
    """Return an `onnx.ModelProto`, in which a scan is still the call of a function.

    Args:
        program: from `lightspine.export.program.trace`.
        opset: see `check_opset`.
        scan: see `lightspine.ops.onnx.scan_table`.
        input_name: what the input is called.
        input_axes: a name for each free axis of the input, the size of each other one.
        output_names: what the outputs are called.

    Raises:
        LightspineError: an operator of the model has no ONNX form in this opset.
    """
    level = logging.getLogger("torch.onnx").level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # It tells on the way what it decomposes.
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = program.run_decompositions(scan_table(scan) | pooling_table())
            found: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=[input_name],
                output_names=list(output_names),
            )
    except UsageError:
        raise
    except Exception as error:
        raise LightspineError(f"opset {opset} cannot carry this model: {_reason(error)}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    model = found.model_proto
    drop_neutral(model.graph)
    _strip(model.graph)
    _name_axes(model.graph.input[0], input_axes)
    return model


def _reason(error: BaseException) -> str:
    # PyTorch wraps the cause in pages of advice.
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def write_scans_out(model: Any, opset: int) -> Any:
    """Return a model with its scans in standard operators: few tools but ONNX Runtime know functions."""
    import onnx
    import onnx.inliner

    called = sorted({node.op_type for node in model.graph.node if node.domain == FUNCTION_DOMAIN})
    if called:
        model.functions.extend(scan_function(name, opset) for name in called)
        if FUNCTION_DOMAIN not in {entry.domain for entry in model.opset_import}:
            model.opset_import.append(onnx.helper.make_opsetid(FUNCTION_DOMAIN, 1))
    inlined = onnx.inliner.inline_local_functions(model)
    drop_unused(inlined.graph)
    standard = [entry for entry in inlined.opset_import if entry.domain == ""]
    del inlined.opset_import[:]
    inlined.opset_import.extend(standard)
    return inlined


def _strip(graph: Any) -> None:
    """Take out where in the source each operator came from: paths of this machine, and a part of the size."""
    del graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip(attribute.g)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.metadata_props[:]


def _name_axes(value: Any, axes: Sequence[str | int]) -> None:
    for dimension, axis in zip(value.type.tensor_type.shape.dim, axes, strict=True):
        if isinstance(axis, str):
            dimension.dim_param = axis
        else:
            dimension.dim_value = axis
