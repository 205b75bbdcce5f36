"""`cross_scan`: scan orders, official reference values, backends against the reference, invariances."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightspine.ops import cross_scan, register_scan_order, scan_order
from lightspine.ops import scan_orders as orders
from lightspine.ops.inputs import CrossScanInputs, SelectiveScanInputs
from support.reference import assert_close, read_figure
from support.scans import (
    CPU_BACKENDS,
    FAST_BACKENDS,
    TOLERANCE,
    assert_all_close,
    convert,
    cross_inputs,
    results_and_gradients,
    run_scan,
)

FIGURES = read_figure("ops")["cross_scan"]
LAW = TOLERANCE[torch.float64]
NAMES = {"cross2d": "cross2d", "unidirectional": "unidi", "bidirectional": "bidi"}


def run_cross(inputs: CrossScanInputs, **options: Any) -> Tensor:
    return cross_scan(*inputs, **options)


@pytest.fixture
def snake() -> Iterator[str]:
    """A user-defined scan order: one direction, every second row reversed."""

    def order(height: int, width: int) -> Tensor:
        pixels = torch.arange(height * width).view(height, width)
        pixels[1::2] = pixels[1::2].flip(1)
        return pixels.view(1, -1)

    register_scan_order("serpentine", order)
    yield "serpentine"
    orders._ORDERS.pop("serpentine")
    orders._validated_order.cache_clear()


@pytest.mark.parametrize(("name", "figure"), NAMES.items())
def test_order_equals_official_figures(name: str, figure: str) -> None:
    assert scan_order(name, *FIGURES["map"][2:]).tolist() == FIGURES[figure]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("name", "figure"), NAMES.items())
def test_merge_equals_official_figures(backend: str, name: str, figure: str) -> None:
    # Steps of 0 and a skip of 0 or 1 per direction leave nothing but the walk to the pixels and back. The
    # figures
    # merge four sequences; each is handed over as a map of its own, in pixel order, through the inverse of
    # its walk.
    draw = np.random.RandomState(11)
    draw.standard_normal((2, 3, 3, 5))
    sequences = torch.from_numpy(draw.standard_normal((2, 4, 3, 3, 5))).flatten(3)
    order = scan_order(name, 3, 5)
    total = torch.zeros(2, 3, 5, 3, dtype=torch.float64)
    for k in range(4):
        x = torch.empty(2, 15, 3, dtype=torch.float64)
        x[:, order[k]] = sequences[:, k].transpose(1, 2)
        inputs = cross_inputs(2, 3, 5, 3)._replace(x=x.view(2, 3, 5, 3), delta_bias=None)
        skip = torch.zeros(4, 3, dtype=torch.float64)
        skip[k] = 1
        inputs = inputs._replace(delta=torch.zeros_like(inputs.delta), D=skip)
        total += run_cross(inputs, order=name, delta_softplus=False, backend=backend)
    assert_close("merge", total.flatten(1, 2).transpose(1, 2), FIGURES[f"merge_{figure}"]["values"], LAW)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_cross_scan_is_the_sum_of_selective_scans(backend: str, name: str) -> None:
    inputs = cross_inputs()
    x, delta, A, B, C, D, delta_bias = (t.flatten(1, 2) if t.dim() >= 4 else t for t in inputs)
    total = torch.zeros_like(x)
    for k, pixels in enumerate(scan_order(name, 5, 7)):
        rows = [t[:, pixels].transpose(1, 2) for t in (x, delta[:, :, k], B[:, :, k], C[:, :, k])]
        one = SelectiveScanInputs(
            rows[0], rows[1], A[k], rows[2][:, None], rows[3][:, None], D[k], None, delta_bias[k]
        )
        out, _ = run_scan(one, delta_softplus=True, backend="reference")
        total[:, pixels] += out.transpose(1, 2)
    assert_close("output", run_cross(inputs, order=name, backend=backend).flatten(1, 2), total, LAW)


def check_against_reference(
    backend: str, dtype: torch.dtype, inputs: CrossScanInputs, order: str = "cross2d"
) -> None:
    inputs = convert(inputs, dtype)
    exact = type(inputs)(*(None if t is None else t.double() for t in inputs))
    actual = results_and_gradients(run_cross, inputs, order=order, backend=backend)
    expected = results_and_gradients(run_cross, exact, order=order, backend="reference")
    assert_all_close(actual, expected, dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("order", NAMES)
@pytest.mark.parametrize("state_dim", [1, 3, 16])
def test_cross_scan_equals_reference(backend: str, dtype: torch.dtype, order: str, state_dim: int) -> None:
    check_against_reference(backend, dtype, cross_inputs(dim=20, state_dim=state_dim), order)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(("height", "width", "dim"), [(1, 1, 3), (1, 63, 5), (14, 14, 96), (40, 25, 8)])
def test_cross_scan_equals_reference_at_awkward_sizes(
    backend: str, height: int, width: int, dim: int
) -> None:
    inputs = cross_inputs(height=height, width=width, dim=dim, state_dim=1)
    check_against_reference(backend, torch.float32, inputs)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 20), st.integers(1, 4)
    ),
    order=st.sampled_from(list(NAMES)),
    with_skip=st.booleans(),
    with_bias=st.booleans(),
)
def test_cross_scan_equals_reference_at_random_sizes(
    backend: str, sizes: tuple[int, int, int, int, int], order: str, with_skip: bool, with_bias: bool
) -> None:
    inputs = cross_inputs(*sizes)
    inputs = inputs._replace(
        D=inputs.D if with_skip else None, delta_bias=inputs.delta_bias if with_bias else None
    )
    check_against_reference(backend, torch.float64, inputs, order)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_cross_scan_takes_a_registered_order(backend: str, snake: str) -> None:
    check_against_reference(backend, torch.float64, cross_inputs(groups=1), snake)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_cross_scan_takes_a_channels_first_map(backend: str) -> None:
    inputs = cross_inputs()
    expected = run_cross(inputs, backend="reference")
    x, delta = (t.movedim(-1, 1).contiguous().movedim(1, -1) for t in inputs[:2])
    assert_close("output", run_cross(inputs._replace(x=x, delta=delta), backend=backend), expected, LAW)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_map_size_first_seen_in_inference_mode_can_be_trained_later(backend: str) -> None:
    inputs = cross_inputs(1, 3, 11, 4, 1)  # a size of this test alone
    with torch.inference_mode():
        cross_scan(*inputs, backend=backend)
    x = inputs.x.requires_grad_()
    cross_scan(x, *inputs[1:], backend=backend).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_transposing_the_map_exchanges_rows_and_columns(backend: str) -> None:
    inputs = cross_inputs()
    exchanged = [1, 0, 3, 2]
    transposed = CrossScanInputs(
        inputs.x.transpose(1, 2),
        *(t[:, :, :, exchanged].transpose(1, 2) if t.dim() == 5 else t[exchanged] for t in inputs[1:]),
    )
    out = run_cross(transposed, backend=backend)
    assert_close("output", out.transpose(1, 2), run_cross(inputs, backend=backend), LAW)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_cross_scan_is_linear_in_the_map(backend: str) -> None:
    inputs, other = cross_inputs(), cross_inputs(seed=1).x
    mixed = run_cross(inputs._replace(x=2 * inputs.x - 3 * other), backend=backend)
    parts = [run_cross(inputs._replace(x=x), backend=backend) for x in (inputs.x, other)]
    assert_close("output", mixed, 2 * parts[0] - 3 * parts[1], LAW)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_cross_scan_gives_float32_for_reduced_precision_input(backend: str) -> None:
    assert run_cross(convert(cross_inputs(), torch.float16), backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_cross_scan_computes_in_float32_under_autocast(backend: str) -> None:
    inputs = convert(cross_inputs(), torch.float32)
    expected = run_cross(inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_cross(inputs, backend=backend)
    assert torch.equal(actual, expected)


def test_reference_gradients_equal_finite_differences() -> None:
    inputs = cross_inputs(1, 2, 3, 2, 2)

    def scan(*tensors: Tensor) -> Tensor:
        return cross_scan(*tensors, backend="reference")

    assert torch.autograd.gradcheck(scan, tuple(t.requires_grad_() for t in inputs))
