"""ONNX cleanup removes no-ops and unused nodes without changing the output."""

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir
import onnxruntime
import pytest

from lightspine.export.onnx_cleanup import remove_no_ops, remove_unused

X = np.arange(1, 13, dtype=np.float32).reshape(1, 3, 2, 2)


def parse(body: str, *, x: str = "float[b, 3, h, w]", y: str = "float[a, c, h, w]") -> onnx.ModelProto:
    text = f'<ir_version: 9, opset_import: ["" : 20]> g ({x} x) => ({y} y)\n{body}'
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))


def run(model: onnx.ModelProto, x: np.ndarray = X) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def without_no_ops(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a checked copy without no-ops that has the same output."""
    cleaned = onnx_ir.from_proto(model)
    remove_no_ops(cleaned)
    result = onnx_ir.to_proto(cleaned)
    onnx.checker.check_model(result, full_check=True)
    np.testing.assert_array_equal(run(result), run(model))
    return result


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "body",
    [
        "<float[3, 1, 1] ones = {1, 1, 1}> { a = Neg(x) m = Mul(a, ones) y = Abs(m) }",
        "<float[3, 1, 1] ones = {1, 1, 1}> { a = Neg(x) m = Mul(ones, a) y = Abs(m) }",
        "<float[1] zero = {0}> { a = Neg(x) m = Add(a, zero) y = Abs(m) }",
        "<float[1] zero = {0}, float one = {1}> { a = Neg(x) m = Add(a, zero) n = Mul(m, one) y = Abs(n) }",
    ],
    ids=["ones", "ones first", "zero", "both in a row"],
)
def test_product_with_ones_and_sum_with_zeros_go(body: str) -> None:
    model = without_no_ops(parse(body))
    assert operators(model) == ["Neg", "Abs"]
    assert len(model.graph.initializer) == 0


def test_shape_of_another_value_is_known() -> None:
    body = """<int64[3] flat = {0, 1, -1}, float[3, 1, 1] ones = {1, 1, 1}>
    { r = Reshape(x, flat) n = Neg(r) s = Shape(x) back = Reshape(n, s) m = Mul(back, ones) y = Abs(m) }"""
    assert operators(without_no_ops(parse(body))) == ["Reshape", "Neg", "Shape", "Reshape", "Abs"]


@pytest.mark.parametrize(
    ("body", "x"),
    [
        ("<float[3, 1, 1] twos = {1, 1, 2}> { a = Neg(x) m = Mul(a, twos) y = Abs(m) }", "float[b, 3, h, w]"),
        ("<float[3, 1, 1] ones = {1, 1, 1}> { a = Neg(x) m = Add(a, ones) y = Abs(m) }", "float[b, 3, h, w]"),
        # One channel would become three.
        ("<float[3, 1, 1] ones = {1, 1, 1}> { a = Neg(x) m = Mul(a, ones) y = Abs(m) }", "float[b, c, h, w]"),
        ("<float[2, 1, 1, 1] ones = {1, 1}> { a = Neg(x) m = Mul(a, ones) y = Abs(m) }", "float[1, 3, h, w]"),
        ("<float[3, 1, 1] ones = {1, 1, 1}> { a = Neg(x) y = Mul(a, ones) }", "float[b, 3, h, w]"),
    ],
    ids=["not all one", "sum with ones", "unknown channels", "more images", "the output"],
)
def test_what_matters_stays(body: str, x: str) -> None:
    model = parse(body, x=x)
    assert operators(without_no_ops(model)) == operators(model)


def test_what_a_branch_reads_stays() -> None:
    body = """<float one = {1}>
    { a = Neg(x) m = Mul(a, one) s = ReduceSum<keepdims = 0>(x) yes = Cast<to = 9>(s)
    y = If(yes) <then_branch = t () => (float[p, q, r, s] ty) { ty = Exp(m) },
                 else_branch = e () => (float[p, q, r, s] ey) { ey = Abs(m) }> }"""
    assert operators(without_no_ops(parse(body))) == ["Neg", "Mul", "ReduceSum", "Cast", "If"]


def test_operators_and_constants_that_nothing_reads_go() -> None:
    model = parse(
        "<float one = {1}, float two = {2}> { a = Neg(x) b = Mul(a, two) c = Abs(b) y = Add(a, one) }"
    )
    model = remove_unused(model)
    assert operators(model) == ["Neg", "Add"]
    assert [value.name for value in model.graph.initializer] == ["one"]
    np.testing.assert_array_equal(run(model), 1 - X)


def test_value_that_only_a_branch_reads_stays() -> None:
    body = """{ a = Neg(x) none = Abs(x) s = ReduceSum<keepdims = 0>(x) yes = Cast<to = 9>(s)
    y = If(yes) <then_branch = t () => (float[p, q, r, s] ty) { ty = Exp(a) },
                 else_branch = e () => (float[p, q, r, s] ey) { ey = Identity(x) }> }"""
    model = parse(body)
    model = remove_unused(model)
    assert operators(model) == ["Neg", "ReduceSum", "Cast", "If"]
    np.testing.assert_allclose(run(model), np.exp(-X), rtol=1e-6)
