"""Scans as PyTorch custom operators: opcheck, tracing, torch.compile, export and FLOP counters."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightspine.ops.cross_scan import cross_scan
from lightspine.ops.flops import scan_flops
from lightspine.ops.selective_scan import scan
from support.reference import assert_close
from support.scans import FAST_BACKENDS, TOLERANCE, convert, cross_inputs, scan_inputs


class Selective(nn.Module):
    def forward(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        return scan(u, delta, A, B, C, D, z, bias, True, True)


class Cross(nn.Module):
    def forward(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
    ) -> Tensor:
        return cross_scan(x, delta, A, B, C, D, bias)


MODULES = [(Selective, scan_inputs), (Cross, cross_inputs)]
both = pytest.mark.parametrize(("module", "make_inputs"), MODULES, ids=["selective", "cross"])


# opcheck itself accesses the gradients of non-leaf tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@both
def test_operator_passes_opcheck(
    backend: str, module: type[nn.Module], make_inputs: Callable[[], Any]
) -> None:
    inputs = tuple(t.float().requires_grad_() for t in make_inputs())
    if module is Selective:
        operator, options = torch.ops.lightspine.selective_scan.default, (True, False, True, backend)
    else:
        operator, options = torch.ops.lightspine.cross_scan.default, (True, "cross2d", True, backend)
    torch.library.opcheck(operator, (*inputs, *options))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_backward_operators_pass_opcheck_without_optional_inputs(backend: str) -> None:
    u, delta, A, B, C, *_ = convert(scan_inputs(), torch.bfloat16)
    state, nothing = torch.zeros(2, 8, 4), torch.empty(0)
    arguments = (u, state, u, delta, A, B, C, None, None, None, nothing, True, False, backend)
    torch.library.opcheck(torch.ops.lightspine.selective_scan_backward.default, arguments)
    x, delta, A, B, C, *_ = convert(cross_inputs(), torch.bfloat16)
    arguments = (x.float(), x, delta, A, B, C, None, None, nothing, True, "cross2d", backend)
    torch.library.opcheck(torch.ops.lightspine.cross_scan_backward.default, arguments)


@both
def test_scripted_module_equals_eager(module: type[nn.Module], make_inputs: Callable[[], Any]) -> None:
    inputs = make_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, timm still promises it
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(module())
    assert torch.equal(scripted(*inputs), module()(*inputs))


@both
def test_symbolic_trace_keeps_one_node(module: type[nn.Module], make_inputs: Callable[[], Any]) -> None:
    traced = torch.fx.symbolic_trace(module())
    calls = [str(n.target) for n in traced.graph.nodes if "lightspine" in str(n.target)]
    assert len(calls) == 1
    inputs = make_inputs()
    assert torch.equal(traced(*inputs), module()(*inputs))


@both
def test_compiled_module_equals_eager_with_all_gradients(
    module: type[nn.Module], make_inputs: Callable[[], Any]
) -> None:
    compiled = torch.compile(module(), fullgraph=True, backend="aot_eager")
    results = []
    for run in (module(), compiled):
        leaves = [t.requires_grad_() for t in make_inputs()]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both
def test_export_keeps_one_node(module: type[nn.Module], make_inputs: Callable[[], Any]) -> None:
    inputs = tuple(make_inputs())
    program = torch.export.export(module(), inputs)
    calls = [
        str(n.target) for n in program.graph.nodes if n.op == "call_function" and "scan" in str(n.target)
    ]
    assert len(calls) == 1
    assert calls[0].startswith("lightspine.")
    assert torch.equal(program.module()(*inputs), module()(*inputs))


def onnx_session(module: nn.Module, inputs: Any, shapes: Any, folder: Any) -> onnxruntime.InferenceSession:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(module, tuple(inputs), dynamo=True, dynamic_shapes=shapes, verbose=False)
    path = folder / "scan.onnx"
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def check_session(session: onnxruntime.InferenceSession, module: nn.Module, inputs: Any) -> None:
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    actual = torch.from_numpy(np.asarray(session.run(None, feed)[0]))
    assert_close("output", actual, module(*inputs), TOLERANCE[torch.float32])


def test_cross_scan_in_onnx_takes_any_batch_and_size(tmp_path: Any) -> None:
    axes = {i: torch.export.Dim(name, min=2) for i, name in enumerate(("b", "h", "w"))}
    shapes = (axes, axes, {}, axes, axes, {}, {})
    session = onnx_session(Cross(), convert(cross_inputs(), torch.float32), shapes, tmp_path)
    check_session(session, Cross(), convert(cross_inputs(3, 4, 9), torch.float32))


def test_selective_scan_in_onnx_takes_any_batch_and_length(tmp_path: Any) -> None:
    batch, length = torch.export.Dim("b", min=2), torch.export.Dim("l", min=2)
    rows, projection = {0: batch, 2: length}, {0: batch, 3: length}
    shapes = (rows, rows, {}, projection, projection, {}, rows, {})
    session = onnx_session(Selective(), convert(scan_inputs(), torch.float32), shapes, tmp_path)
    check_session(session, Selective(), convert(scan_inputs(3, length=21), torch.float32))


def test_flop_counter_counts_twice_the_published_figure() -> None:
    inputs = scan_inputs(2, 8, 37, 4)
    with FlopCounterMode(display=False) as counter:
        Selective()(*inputs)
    assert counter.get_total_flops() == 2 * (9 * 2 * 37 * 8 * 4 + 2 * 37 * 8 + 2 * 37 * 8)
    assert counter.get_total_flops() == 2 * scan_flops(2, 37, 8, 4, with_D=True, with_z=True)


def test_flop_counter_counts_the_directions_of_a_map() -> None:
    x, delta, A, B, C, *_ = cross_inputs(2, 5, 7, 6, 2)
    with FlopCounterMode(display=False) as counter:
        cross_scan(x, delta, A, B, C)
    assert counter.get_total_flops() == 2 * scan_flops(2, 35, 4 * 6, 2, with_D=False)


def test_flop_counter_counts_the_backward() -> None:
    leaves = [t.requires_grad_() for t in cross_inputs()]
    with FlopCounterMode(display=False) as counter:
        Cross()(*leaves).sum().backward()
    forward = 2 * scan_flops(2, 35, 4 * 6, 2)
    assert counter.get_total_flops() == 4 * forward
