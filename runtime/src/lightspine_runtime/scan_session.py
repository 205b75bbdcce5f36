"""An exported network in parts for ONNX Runtime, with its scans computed by compiled kernels in between."""

import ctypes
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from lightspine_runtime.scan_kernels import SCAN_FUNCTIONS, run_scans

_DOMAIN = "lightspine"
# By default each part has a thread per core, at most this many: a network may have more than 25 parts.
_MAX_DEFAULT_THREADS = 16
# The threads of one part would otherwise keep the cores busy while the next part or a scan runs.
_PART_OPTIONS = {"session.intra_op.spin_duration_us": "50", "session.force_spinning_stop": "1"}
_ELEMENTS: dict[str, tuple[type, type]] = {
    "tensor(float)": (np.float32, ctypes.c_float),
    "tensor(int64)": (np.int64, ctypes.c_int64),
}


class CannotSplitError(Exception):
    """A file that cannot be split at its scans; the message says why."""


@dataclass(frozen=True)
class _Scan:
    """A call of a scan function."""

    name: str
    inputs: list[str]
    output: str


@dataclass(frozen=True)
class _Part:
    """Operators that ONNX Runtime computes in one call, and the scans that follow them."""

    session: onnxruntime.InferenceSession
    inputs: list[str]
    outputs: list[str]
    scans: list[_Scan]
    obsolete: list[str]
    """Values that no later part reads."""


class ScanSession:
    """An exported network whose scans are computed by compiled kernels, not by the loops of the file.

    The network is split at its scans; ONNX Runtime computes the parts. Has the methods of
    `onnxruntime.InferenceSession` that `OnnxModel` uses. Any number of threads may call `run` at once.

    Args:
        path: the file.
        threads: number of threads; by default one per core, at most 16.

    Raises:
        CannotSplitError: the file cannot be parsed, or cannot be split at its scans.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.threads = threads or min(_count_cores(), _MAX_DEFAULT_THREADS)
        try:
            self._open(_read(path))
        # What a graph that no exporter writes leads to: calls without outputs, names twice, wrong constants.
        except (LookupError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise CannotSplitError(f"its graph is damaged: {error!r}") from error
        self._pool = ThreadPoolExecutor(max(self.threads - 1, 1), thread_name_prefix="lightspine-scan")

    def _open(self, model: onnx.ModelProto) -> None:
        constants = {value.name: value for value in model.graph.initializer}
        plan = _plan(model.graph, constants)
        read_by_scans = {name for _, scans in plan for scan in scans for name in scan.inputs}
        self._constants = {
            name: numpy_helper.to_array(constants[name]) for name in read_by_scans & constants.keys()
        }
        self._outputs = [value.name for value in model.graph.output]
        self._parts = _build_parts(model, plan, constants, self.threads)

    def run(
        self, output_names: Sequence[str] | None, inputs: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[Any]]:
        """Compute the outputs; see `onnxruntime.InferenceSession.run`."""
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in inputs.items()
        }
        for part in self._parts:
            found = part.session.run_with_ort_values(
                part.outputs, {name: values[name] for name in part.inputs}
            )
            values.update(zip(part.outputs, found, strict=True))
            calls = [(scan.name, [self._array(name, values) for name in scan.inputs]) for scan in part.scans]
            for scan, y in zip(part.scans, run_scans(calls, self._pool, self.threads), strict=True):
                values[scan.output] = onnxruntime.OrtValue.ortvalue_from_numpy(y)
            for name in part.obsolete:
                values.pop(name, None)
        return [values[name].numpy() for name in output_names or self._outputs]

    def get_inputs(self) -> list[Any]:
        """Return name, shape and type of the input; see `onnxruntime.InferenceSession.get_inputs`."""
        return self._parts[0].session.get_inputs()

    def get_outputs(self) -> list[Any]:
        """Return names, shapes and types of the outputs."""
        found = {value.name: value for part in self._parts for value in part.session.get_outputs()}
        return [found[name] for name in self._outputs]

    def get_modelmeta(self) -> Any:
        """Return the metadata of the file."""
        return self._parts[0].session.get_modelmeta()

    def _array(self, name: str, values: Mapping[str, Any]) -> NDArray[Any]:
        return self._constants[name] if name in self._constants else _view(values[name])


def _view(value: onnxruntime.OrtValue) -> NDArray[Any]:
    """Return a tensor as an array that shares its memory; `OrtValue.numpy` copies it."""
    kind, shape = value.data_type(), value.shape()
    if kind not in _ELEMENTS:
        raise ValueError(f"expected inputs of a scan of {' or '.join(_ELEMENTS)}, got {kind}")
    dtype, element = _ELEMENTS[kind]
    if 0 in shape:
        return np.empty(shape, dtype)
    memory = (element * math.prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype).reshape(shape)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    # Damaged files raise exceptions of protobuf, which onnx does not re-export.
    except Exception as error:
        raise CannotSplitError(f"it cannot be parsed: {error}") from error
    defined = {function.name for function in model.functions if function.domain == _DOMAIN}
    if not any(_is_scan(node) and node.op_type in defined for node in model.graph.node):
        raise CannotSplitError("it calls no scan that it defines")
    if any(value.data_location == onnx.TensorProto.EXTERNAL for value in model.graph.initializer):
        raise CannotSplitError("its weights are in another file")
    return model


def _is_scan(node: onnx.NodeProto) -> bool:
    return node.domain == _DOMAIN and node.op_type in SCAN_FUNCTIONS


# The operators and the scans of each part; the scans read what the operators return.
_Plan = list[tuple[list[onnx.NodeProto], list[_Scan]]]


def _plan(graph: onnx.GraphProto, constants: Iterable[str]) -> _Plan:
    """Assign each operator to the first part in which its inputs are known."""
    part_of = {value.name: 0 for value in graph.input} | dict.fromkeys(constants, 0)
    plan: _Plan = [([], [])]
    for node in graph.node:
        try:
            place = max((part_of[name] for name in _read_by(node)), default=0)
        except KeyError as error:
            raise CannotSplitError(f"nothing computes {error}, which one of its operators reads") from error
        if _is_scan(node):
            plan[place][1].append(_Scan(node.op_type, list(node.input), node.output[0]))
            place += 1
            if place == len(plan):
                plan.append(([], []))
        else:
            plan[place][0].append(node)
        part_of.update(dict.fromkeys(node.output, place))
    return plan


def _build_parts(
    model: onnx.ModelProto, plan: _Plan, constants: Mapping[str, onnx.TensorProto], threads: int
) -> list[_Part]:
    types = _value_types(model)
    wanted = {value.name for value in model.graph.output}
    last_use: dict[str, int] = {}
    for place, (nodes, scans) in enumerate(plan):
        for name in _all_read(nodes, scans):
            last_use[name] = place
    parts = []
    for place, (nodes, scans) in enumerate(plan):
        made = [name for node in nodes for name in node.output if name]
        used = sorted(_all_read(nodes, []) - set(made))
        inputs = [name for name in used if name not in constants]
        for_scans = {name for scan in scans for name in scan.inputs}
        outputs = [
            name for name in made if name in wanted or name in for_scans or last_use.get(name, 0) > place
        ]
        graph = onnx.helper.make_graph(
            nodes,
            f"part{place}",
            [_type_of(name, types) for name in inputs],
            [_type_of(name, types) for name in outputs],
            [constants[name] for name in used if name in constants],
        )
        parts.append(
            _Part(
                session=_open_part(model, graph, threads),
                inputs=inputs,
                outputs=outputs,
                scans=scans,
                obsolete=[name for name, end in last_use.items() if end == place and name not in wanted],
            )
        )
    if [value.name for value in model.graph.input] != parts[0].inputs:
        raise CannotSplitError("its operators before the first scan do not read the input")
    if wanted - {name for part in parts for name in part.outputs}:
        raise CannotSplitError("an output is not computed by an operator")
    return parts


def _open_part(model: onnx.ModelProto, graph: onnx.GraphProto, threads: int) -> onnxruntime.InferenceSession:
    part = onnx.helper.make_model(
        graph,
        ir_version=model.ir_version,
        opset_imports=model.opset_import,
        functions=model.functions if _calls_functions(graph) else [],
    )
    part.metadata_props.extend(model.metadata_props)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in _PART_OPTIONS.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(
            part.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    # ONNX Runtime has one exception class per status code and no public base class.
    except Exception as error:
        raise CannotSplitError(f"ONNX Runtime cannot run a part of it: {error}") from error


def _value_types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Return the types of all values, those of an exported file and the inferred ones."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    # onnx raises several classes, one of them without a public name.
    except Exception as error:
        raise CannotSplitError(f"the types of its values cannot be inferred: {error}") from error
    values = (*inferred.value_info, *model.graph.input, *model.graph.output)
    return {value.name: value for value in values}


def _type_of(name: str, types: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    if name not in types or not types[name].type.tensor_type.elem_type:
        raise CannotSplitError(f"the type of {name} cannot be inferred")
    return types[name]


def _all_read(nodes: Iterable[onnx.NodeProto], scans: Iterable[_Scan]) -> set[str]:
    """Return the names of all values that operators and scans read."""
    by_nodes = {name for node in nodes for name in _read_by(node)}
    return by_nodes.union(*(scan.inputs for scan in scans))


def _read_by(node: onnx.NodeProto) -> set[str]:
    """Return the names of the values that an operator reads, those in its subgraphs included."""
    return {name for name in node.input if name}.union(*map(_read_from_outside, _subgraphs(node)))


def _read_from_outside(graph: onnx.GraphProto) -> set[str]:
    own = {value.name for value in (*graph.input, *graph.initializer)}
    read = {value.name for value in graph.output}
    for node in graph.node:
        read |= _read_by(node)
        own.update(node.output)
    return read - own


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [
        graph
        for attribute in node.attribute
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))
    ]


def _calls_functions(graph: onnx.GraphProto) -> bool:
    return any(node.domain == _DOMAIN or any(map(_calls_functions, _subgraphs(node))) for node in graph.node)
