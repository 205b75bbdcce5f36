"""Exported files with compiled scans: the values of plain ONNX Runtime, at any size and from any thread."""

import importlib.util
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from lightspine.ops.onnx import scan_function
from lightspine_runtime import OnnxModel, UsageError

# Largest relative difference of float32 sums in different order.
TOLERANCE = 1e-5


# Two scans of the same values and one of their sum; an order that depends on the image size; a subgraph that
# reads a value of an earlier part.
NETWORK = """
<ir_version: 10, opset_import: ["": 20, "lightspine": 1]>
network (float[batch, 3, height, width] images) => (float[batch, 8] logits)
{
  half = Constant<value_float=0.5>()
  none = Constant<value_int=0>()
  single = Constant<value_int=1>()
  channels = Constant<value_ints=[0, 8, -1]>()
  middle = Constant<value_ints=[1]>()
  groups = Constant<value_ints=[0, 0, 1, 8]>()
  states = Constant<value_ints=[0, 0, 1, 3]>()
  map = Conv(images, kernel)
  rows = Reshape(map, channels)
  x = Transpose<perm=[0, 2, 1]>(rows)
  delta = MatMul(x, square)
  B = MatMul(x, narrow)
  ahead = lightspine.SequenceScan(x, delta, bias, A, B, B)
  back = lightspine.SequenceScanReverse(x, delta, bias, A, B, B)
  both = Add(ahead, back)
  n_dims = Shape<start=1, end=2>(x)
  n = Squeeze(n_dims)
  steps = Range(none, n, single)
  order = Unsqueeze(steps, none)
  x_4 = Reshape(both, groups)
  delta_4 = Reshape(delta, groups)
  B_all = MatMul(both, narrow)
  B_4 = Reshape(B_all, states)
  grouped = lightspine.GroupedScan(x_4, delta_4, bias, A, B_4, B_4, order)
  mean = ReduceMean<keepdims=0>(grouped, middle)
  largest = ReduceMax<keepdims=0>(mean)
  positive = Greater(largest, half)
  scaled = If(positive)<
    then_branch = above () => (float[b, d] y) {
      earlier = ReduceMean<keepdims=0>(delta, middle) y = Add(mean, earlier) },
    else_branch = below () => (float[b, d] y) { y = Identity(mean) }>
  shift = ReduceMean<keepdims=0>(x, middle)
  logits = Add(scaled, shift)
}
"""
PREPROCESSING = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}


def save_network(path: Path, *, text: str = NETWORK, functions: bool = True) -> Path:
    """Write the file of a small network with random weights."""
    generator = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    shapes = {"kernel": (8, 3, 1, 1), "square": (8, 8), "narrow": (8, 3), "bias": (1, 8), "A": (1, 8, 3)}
    for name, shape in shapes.items():
        values = 0.5 * generator.standard_normal(shape).astype(np.float32)
        values = -np.exp(values) if name == "A" else values
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    if functions:
        called = ("SequenceScan", "SequenceScanReverse", "GroupedScan")
        model.functions.extend(scan_function(name, 20) for name in called)
    metadata = {"model": "network", "kind": "classifier", "preprocessing": json.dumps(PREPROCESSING)}
    for key, value in metadata.items():
        model.metadata_props.add(key=f"lightspine.{key}", value=value)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("scans") / "network.onnx")


def random_images(batch: int, height: int, width: int) -> Any:
    return np.random.default_rng(0).standard_normal((batch, 3, height, width)).astype(np.float32)


def check_outputs(compiled: OnnxModel, plain: OnnxModel, images: Any) -> None:
    for found, expected in zip(compiled.run(images), plain.run(images), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


def test_outputs_are_those_of_onnx_runtime_at_changing_sizes(file: Path) -> None:
    compiled = OnnxModel(file, threads=2)
    plain = OnnxModel(file, threads=2, compiled_scans=False)
    assert (compiled.compiled_scans, plain.compiled_scans) == (True, False)
    for shape in ((1, 64, 64), (3, 32, 96), (2, 97, 61), (1, 64, 64)):
        check_outputs(compiled, plain, random_images(*shape))


def test_description_is_that_of_onnx_runtime(file: Path) -> None:
    compiled, plain = OnnxModel(file), OnnxModel(file, compiled_scans=False)
    assert compiled.metadata == plain.metadata
    for ours, theirs in (
        (compiled.session.get_inputs(), plain.session.get_inputs()),
        (compiled.session.get_outputs(), plain.session.get_outputs()),
    ):
        assert [(v.name, v.shape, v.type) for v in ours] == [(v.name, v.shape, v.type) for v in theirs]
    assert "compiled_scans=True" in repr(compiled)
    assert "compiled_scans=False" in repr(plain)


def test_threads_may_run_a_model_at_once(file: Path) -> None:
    model = OnnxModel(file, threads=2)
    batches = [random_images(1 + i % 3, 32 + 16 * (i % 4), 64) for i in range(16)]
    expected = [model.run(batch)[0] for batch in batches]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            for found, alone in zip(pool.map(model.run, batches), expected, strict=True):
                np.testing.assert_array_equal(found[0], alone)


def test_batch_of_another_type_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a batch of .*tensor\(float\), got .*float64"):
        OnnxModel(file).run(random_images(1, 64, 64).astype(np.float64))


def test_onnx_runtime_computes_the_scans_without_the_packages(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    with caplog.at_level(logging.INFO, "lightspine_runtime"):
        assert not OnnxModel(file).compiled_scans
    assert "numba cannot be imported: pip install 'lightspine-runtime[fast]'" in caplog.text
    with pytest.raises(UsageError, match="numba cannot be imported"):
        OnnxModel(file, compiled_scans=True)


def test_file_without_scans_needs_no_kernels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "".join(line for line in NETWORK.splitlines(True) if "lightspine." not in line)
    text = text.replace("Add(ahead, back)", "Add(x, delta)").replace("(grouped, middle)", "(x, middle)")
    path = save_network(tmp_path / "plain.onnx", text=text, functions=False)
    with caplog.at_level(logging.DEBUG, "lightspine_runtime"):
        assert not OnnxModel(path).compiled_scans
    assert not caplog.text
    with pytest.raises(UsageError, match=r"expected scans .*, but .*plain\.onnx has none"):
        OnnxModel(path, compiled_scans=True)


def test_file_that_cannot_be_split_is_left_to_onnx_runtime(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = onnx.load(file)
    weight = content.graph.initializer[0]
    content.graph.output.append(
        onnx.helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims))
    )
    onnx.save(content, tmp_path / "weight.onnx")
    assert not OnnxModel(tmp_path / "weight.onnx").compiled_scans
    assert "an output is not computed by an operator" in caplog.text
    with pytest.raises(UsageError, match="an output is not computed by an operator"):
        OnnxModel(tmp_path / "weight.onnx", compiled_scans=True)
