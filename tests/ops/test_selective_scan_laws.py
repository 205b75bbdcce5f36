"""`selective_scan`: properties of the recurrence (linearity, causality, reversal) on every backend."""

import pytest
import torch

from support.reference import assert_close
from support.scans import CPU_BACKENDS, TOLERANCE, run_scan, scan_inputs

LAW = TOLERANCE[torch.float64]
pytestmark = pytest.mark.parametrize("backend", CPU_BACKENDS)


def test_scan_is_linear_in_u(backend: str) -> None:
    inputs, other = scan_inputs(), scan_inputs(seed=1).u
    options = {"delta_softplus": True, "backend": backend}
    mixed = run_scan(inputs._replace(u=2 * inputs.u - 3 * other), **options)
    first, second = run_scan(inputs, **options), run_scan(inputs._replace(u=other), **options)
    for name, whole, one, two in zip(("output", "state"), mixed, first, second, strict=True):
        assert_close(name, whole, 2 * one - 3 * two, LAW)


@pytest.mark.parametrize("length", [1, 13, 36])
def test_scan_of_a_prefix_is_the_prefix_of_the_scan(backend: str, length: int) -> None:
    inputs = scan_inputs()
    whole, _ = run_scan(inputs, delta_softplus=True, backend=backend)
    prefix = inputs._replace(
        **{name: getattr(inputs, name)[..., :length] for name in ("u", "delta", "B", "C", "z")}
    )
    part, _ = run_scan(prefix, delta_softplus=True, backend=backend)
    assert_close("prefix", part, whole[..., :length], LAW)


def test_step_of_zero_keeps_the_state(backend: str) -> None:
    inputs = scan_inputs()._replace(delta_bias=None)
    inputs.delta[..., 20:] = 0
    _, state = run_scan(inputs, backend=backend)
    shorter = inputs._replace(
        **{name: getattr(inputs, name)[..., :20] for name in ("u", "delta", "B", "C", "z")}
    )
    _, expected = run_scan(shorter, backend=backend)
    assert_close("state", state, expected, LAW)


def test_channels_do_not_see_each_other(backend: str) -> None:
    inputs = scan_inputs()
    out, _ = run_scan(inputs, delta_softplus=True, backend=backend)
    changed = inputs._replace(u=inputs.u.clone(), delta=inputs.delta.clone())
    changed.u[:, 3] += 1
    changed.delta[:, 3] -= 1
    other, _ = run_scan(changed, delta_softplus=True, backend=backend)
    differs = (out != other).any(dim=2).any(dim=0)
    assert differs.nonzero().flatten().tolist() == [3]


def test_reverse_scan_is_the_flipped_scan_of_the_flipped_input(backend: str) -> None:
    inputs = scan_inputs()
    flipped = inputs._replace(
        **{name: getattr(inputs, name).flip(-1) for name in ("u", "delta", "B", "C", "z")}
    )
    out, state = run_scan(inputs, delta_softplus=True, reverse=True, backend=backend)
    expected, expected_state = run_scan(flipped, delta_softplus=True, backend=backend)
    assert_close("output", out, expected.flip(-1), LAW)
    assert_close("state", state, expected_state, LAW)


def test_later_positions_do_not_reach_earlier_ones(backend: str) -> None:
    inputs = scan_inputs()
    out, _ = run_scan(inputs, delta_softplus=True, backend=backend)
    inputs.u[:, :, 20] = float("nan")
    broken, _ = run_scan(inputs, delta_softplus=True, backend=backend)
    assert torch.equal(out[..., :20], broken[..., :20])
    assert broken[..., 20:].isnan().all()


def test_large_decay_neither_overflows_nor_divides_by_zero(backend: str) -> None:
    inputs = scan_inputs(length=200)
    inputs = inputs._replace(A=inputs.A * 1e4, delta_bias=inputs.delta_bias + 20)
    out, state = run_scan(inputs, delta_softplus=True, backend=backend)
    expected, _ = run_scan(inputs, delta_softplus=True, backend="reference")
    assert_close("output", out, expected, LAW)
    assert torch.isfinite(state).all()
