"""`selective_scan`: every backend against official reference values and the reference."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightspine.ops.selective_scan import selective_scan
from support.reference import assert_close, read_figure
from support.scans import (
    CPU_BACKENDS,
    FAST_BACKENDS,
    TOLERANCE,
    assert_all_close,
    convert,
    figure_inputs,
    results_and_gradients,
    run_scan,
    scan_inputs,
)

FIGURES = read_figure("ops")["selective_scan"]


def assert_matches(name: str, actual: Tensor, figure: dict, tolerance: float) -> None:
    """Compare with reference values: all of a small tensor, or every n-th and the norm of a large one."""
    assert list(actual.shape) == figure["shape"], name
    if "values" in figure:
        assert_close(name, actual, figure["values"], tolerance)
    else:
        assert_close(name, actual.flatten()[:: figure["sample_stride"]], figure["sample"], tolerance)
        assert_close(f"norm of {name}", actual.norm(), figure["l2"], tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", FIGURES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=str)
def test_scan_equals_official_figures(backend: str, case: dict, dtype: torch.dtype, tolerance: float) -> None:
    inputs, weights = figure_inputs(case)
    inputs = convert(inputs, dtype)
    leaves = type(inputs)(*(None if t is None else t.requires_grad_() for t in inputs))
    out, state = run_scan(leaves, delta_softplus=case["with_delta_bias_and_softplus"], backend=backend)
    assert_matches("output", out, case["out"], tolerance)
    assert_matches("last state", state, case["last_state"], tolerance)
    (out * weights.to(dtype)).sum().backward()
    for name, expected in case["grad"].items():
        assert_matches(f"gradient of {name}", getattr(leaves, name).grad, expected, tolerance)


def check_against_reference(backend: str, dtype: torch.dtype, options: dict, **sizes: int) -> None:
    inputs = convert(scan_inputs(**sizes), dtype)
    # The same rounded numbers in float64, so that only the backend's own error counts.
    exact = type(inputs)(*(t.double() for t in inputs))
    actual = results_and_gradients(run_scan, inputs, backend=backend, **options)
    expected = results_and_gradients(run_scan, exact, backend="reference", **options)
    assert_all_close(actual, expected, dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [1, 2, 63, 196])
@pytest.mark.parametrize(("groups", "state_dim"), [(1, 1), (2, 3), (4, 16), (1, 16)])
def test_scan_equals_reference(
    backend: str, dtype: torch.dtype, reverse: bool, length: int, groups: int, state_dim: int
) -> None:
    options = {"delta_softplus": True, "reverse": reverse}
    check_against_reference(
        backend, dtype, options, length=length, groups=groups, state_dim=state_dim, dim=12
    )


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(("length", "dim"), [(1000, 8), (70, 100), (30, 132)])
def test_scan_equals_reference_at_larger_sizes(backend: str, length: int, dim: int) -> None:
    options = {"delta_softplus": True}
    check_against_reference(backend, torch.float32, options, batch=3, length=length, dim=dim, groups=4)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dim", [1, 4])
def test_scan_equals_reference_in_reduced_precision(backend: str, dtype: torch.dtype, state_dim: int) -> None:
    check_against_reference(backend, dtype, {"delta_softplus": True}, dim=24, state_dim=state_dim)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 5),
    channels=st.integers(1, 20),
    length=st.integers(1, 40),
    state_dim=st.integers(1, 6),
    reverse=st.booleans(),
    softplus=st.booleans(),
    given_optionals=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_scan_equals_reference_at_random_sizes(
    backend: str,
    batch: int,
    groups: int,
    channels: int,
    length: int,
    state_dim: int,
    reverse: bool,
    softplus: bool,
    given_optionals: tuple[bool, bool, bool],
) -> None:
    inputs = scan_inputs(batch, groups * channels, length, state_dim, groups)
    if not softplus:
        inputs = inputs._replace(delta=inputs.delta.abs(), delta_bias=inputs.delta_bias.abs())
    for name, keep in zip(("D", "z", "delta_bias"), given_optionals, strict=True):
        if not keep:
            inputs = inputs._replace(**{name: None})
    options = {"reverse": reverse, "delta_softplus": softplus}
    actual = results_and_gradients(run_scan, inputs, backend=backend, **options)
    expected = results_and_gradients(run_scan, inputs, backend="reference", **options)
    assert_all_close(actual, expected, torch.float64)


def scattered(t: Tensor) -> Tensor:
    """Return a copy that is neither contiguous nor dense."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype)
    view = wide[..., 1::2]
    view.copy_(t)
    return view


def channels_innermost(t: Tensor) -> Tensor:
    return t if t.dim() < 2 else t.transpose(1, -1).contiguous().transpose(1, -1)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("layout", [scattered, channels_innermost], ids=["scattered", "channels-innermost"])
def test_scan_takes_any_memory_layout(backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = scan_inputs(dim=12)
    moved = type(inputs)(*(layout(t) for t in inputs))
    leaves = [t.requires_grad_() for t in moved]
    out, state = run_scan(moved, delta_softplus=True, backend=backend)
    expected = results_and_gradients(run_scan, inputs, delta_softplus=True, backend="reference")
    draw = torch.Generator().manual_seed(1)
    weights = [layout(torch.randn(t.shape, generator=draw, dtype=t.dtype)) for t in (out, state)]
    grads = torch.autograd.grad([out, state], leaves, weights)
    actual = {"output 0": out.detach(), "output 1": state.detach()}
    actual |= {f"grad {name}": grad for name, grad in zip(inputs._fields, grads, strict=True)}
    assert_all_close(actual, expected, torch.float64)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", ["BNL", "DN", "mixed"])
def test_scan_takes_projections_of_every_shape_of_mamba(backend: str, shape: str) -> None:
    inputs = scan_inputs(groups=1)
    constant = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)
    per_channel = constant[None, :, :, None].expand(2, 8, 4, 37)
    given_as, means = {
        "BNL": ((inputs.B[:, 0], inputs.C[:, 0]), (inputs.B, inputs.C)),
        "DN": ((constant, constant.flip(0)), (per_channel, per_channel.flip(1))),
        "mixed": ((constant, inputs.C), (per_channel, inputs.C.expand(-1, 8, -1, -1))),
    }[shape]
    out, _ = run_scan(inputs._replace(B=given_as[0], C=given_as[1]), backend=backend)
    expected, _ = run_scan(inputs._replace(B=means[0], C=means[1]), backend="reference")
    assert_close("output", out, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scan_computes_in_float32_under_autocast(backend: str) -> None:
    inputs = convert(scan_inputs(), torch.float32)
    expected = run_scan(inputs, delta_softplus=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_scan(inputs, delta_softplus=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_state_is_float32_for_reduced_precision_input(backend: str) -> None:
    _, state = run_scan(convert(scan_inputs(), torch.bfloat16), backend=backend)
    assert state.dtype == torch.float32


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_scan_gives_gradients_only_to_what_asks_for_them(backend: str) -> None:
    inputs = scan_inputs()
    inputs.A.requires_grad_()
    out, _ = run_scan(inputs, delta_softplus=True, backend=backend)
    out.sum().backward()
    assert [t.grad is not None for t in inputs] == [name == "A" for name in inputs._fields]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_scan_is_deterministic(backend: str) -> None:
    inputs = convert(scan_inputs(dim=64, length=100), torch.float32)
    options = {"delta_softplus": True, "backend": backend}
    first, second = (results_and_gradients(run_scan, inputs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scan_without_last_state_returns_one_tensor() -> None:
    inputs = scan_inputs()
    assert isinstance(selective_scan(*inputs), Tensor)
