"""The compiled scans: the values of the functions in an exported file, and no read outside of the inputs."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
import pytest
from numpy.typing import NDArray

from lightspine.ops import onnx as scan_functions
from lightspine_runtime.scan_kernels import SCAN_FUNCTIONS, run_scans

OPSET = 20
# Relative to the largest value: both sum in float32, in different order.
TOLERANCE = 2e-6


def make_inputs(name: str, batch: int, positions: int, dim: int, *, maps: int = 1) -> list[NDArray[Any]]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape).astype(np.float32)

    grouped = name.startswith("GroupedScan")
    groups = 3 if grouped else 1
    states = 1 if "OneState" in name else 5
    inputs = [
        normal(batch, positions, maps, dim),
        2 * normal(batch, positions, groups, dim),
        normal(groups, dim),
        -np.exp(normal(groups, dim, states)),
        normal(batch, positions, groups, states),
        normal(batch, positions, groups, states),
    ]
    if name.endswith("WithoutSoftplus"):
        inputs[1:3] = [abs(value) for value in inputs[1:3]]
    if grouped:
        return [*inputs, np.stack([generator.permutation(positions) for _ in range(groups)])]
    return [value[:, :, 0] if value.ndim == 4 else value for value in inputs]


def run_in_onnx_runtime(name: str, inputs: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Compute a scan by the body of its function."""
    types = ", ".join(
        f"{'int64' if value.dtype == np.int64 else 'float'}[{','.join(map(str, value.shape))}] i{place}"
        for place, value in enumerate(inputs)
    )
    arguments = ", ".join(f"i{place}" for place in range(len(inputs)))
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {OPSET}, "lightspine": 1]> '
        f"scan ({types}) => (float[a, b, c] y) {{ y = lightspine.{name}({arguments}) }}"
    )
    model.functions.append(scan_functions.scan_function(name, OPSET))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {f"i{place}": value for place, value in enumerate(inputs)})[0]


def run_compiled(name: str, inputs: list[NDArray[Any]], threads: int = 1) -> NDArray[np.float32]:
    with ThreadPoolExecutor(max(threads - 1, 1)) as pool:
        return run_scans([(name, inputs)], pool, threads)[0]


def test_all_functions_of_exported_files_are_compiled() -> None:
    assert set(SCAN_FUNCTIONS) == set(scan_functions.SCAN_FUNCTIONS)


@pytest.mark.parametrize("name", SCAN_FUNCTIONS)
@pytest.mark.parametrize(
    ("batch", "positions", "dim", "threads"), [(2, 23, 37, 3), (1, 7, 400, 1), (1, 1, 1, 16)], ids=str
)
def test_values_are_those_of_the_function(
    name: str, batch: int, positions: int, dim: int, threads: int
) -> None:
    inputs = make_inputs(name, batch, positions, dim)
    expected = run_in_onnx_runtime(name, inputs)
    found = run_compiled(name, inputs, threads)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


def test_a_group_may_have_its_own_map() -> None:
    inputs = make_inputs("GroupedScan", 2, 9, 20, maps=3)
    expected = run_in_onnx_runtime("GroupedScan", inputs)
    np.testing.assert_allclose(
        run_compiled("GroupedScan", inputs), expected, rtol=0, atol=TOLERANCE * abs(expected).max()
    )


@pytest.mark.parametrize("name", ["SequenceScan", "GroupedScanOneState"])
@pytest.mark.parametrize("delta", [-200.0, -20.0, 20.0, 200.0])
def test_extreme_steps_neither_overflow_nor_lose_digits(name: str, delta: float) -> None:
    inputs = make_inputs(name, 1, 6, 16)
    inputs[1][:] = delta
    inputs[2][:] = 0
    expected = run_in_onnx_runtime(name, inputs)
    assert np.isfinite(expected).all()
    # Below -126, a power of two is the smallest normal number instead of zero.
    np.testing.assert_allclose(run_compiled(name, inputs), expected, rtol=2e-5, atol=1e-35)


@pytest.mark.parametrize("name", ["SequenceScan", "GroupedScanOneState"])
@pytest.mark.parametrize("place", range(6), ids=["x", "delta", "bias", "A", "B", "C"])
def test_nan_reaches_the_outputs_that_it_reaches_in_the_function(name: str, place: int) -> None:
    inputs = make_inputs(name, 1, 8, 16)
    inputs[place].reshape(-1)[inputs[place].size // 2] = np.nan
    expected = np.isnan(run_in_onnx_runtime(name, inputs))
    assert expected.any()
    np.testing.assert_array_equal(np.isnan(run_compiled(name, inputs)), expected)


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5, 6, 8], [-1, 1, 2, 3, 4, 5, 6, 7], [0, 0, 2, 3, 4, 5, 6, 7]], ids=str
)
def test_order_outside_of_the_positions_is_refused(order: list[int]) -> None:
    inputs = make_inputs("GroupedScan", 1, 8, 16)
    inputs[-1][1] = order
    with pytest.raises(ValueError, match="expected an order that visits each position of a scan once"):
        run_compiled("GroupedScan", inputs)


@pytest.mark.parametrize("place", range(7))
def test_inputs_that_do_not_fit_together_are_refused(place: int) -> None:
    inputs = make_inputs("GroupedScan", 1, 8, 16)
    inputs[place] = inputs[place][..., :-1]
    with pytest.raises(ValueError, match="expected inputs of a scan of shapes"):
        run_compiled("GroupedScan", inputs)


def test_other_precisions_are_refused() -> None:
    inputs = make_inputs("SequenceScan", 1, 8, 16)
    inputs[0] = inputs[0].astype(np.float16)
    with pytest.raises(ValueError, match=r"expected float32 and an int64 order, got .*float16"):
        run_compiled("SequenceScan", inputs)
