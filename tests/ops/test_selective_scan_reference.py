"""Reference `selective_scan`: hand-computed values and finite differences."""

import math

import torch
from torch import Tensor

from lightspine.ops.selective_scan import selective_scan
from support.reference import assert_close
from support.scans import TOLERANCE, run_scan, scan_inputs

LAW = TOLERANCE[torch.float64]


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def test_reference_two_steps_by_hand() -> None:
    out, state = selective_scan(
        row(2, 3),
        row(1, 0.5),
        row(-1)[0],
        row(1, 2)[None],
        row(10, 100)[None],
        torch.tensor([7.0], dtype=torch.float64),
        return_last_state=True,
        backend="reference",
    )
    # h_1 = 1 * 1 * 2 = 2; h_2 = exp(-0.5) * 2 + 0.5 * 2 * 3
    second = 2 * math.exp(-0.5) + 3
    assert_close("output", out, [10 * 2 + 7 * 2, 100 * second + 7 * 3], LAW)
    assert_close("state", state, [second], LAW)


def test_reference_softplus_bias_and_gate_by_hand() -> None:
    out = selective_scan(
        row(2),
        row(0.25),
        row(-1)[0],
        row(3)[None],
        row(5)[None],
        z=row(-1.5),
        delta_bias=torch.tensor([0.5], dtype=torch.float64),
        delta_softplus=True,
        backend="reference",
    )
    step = math.log(1 + math.exp(0.75))
    gate = -1.5 / (1 + math.exp(1.5))
    assert_close("output", out, [step * 3 * 2 * 5 * gate], LAW)


def test_reference_gradients_equal_finite_differences() -> None:
    inputs = scan_inputs(batch=1, dim=4, length=5, state_dim=2, groups=2)

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run_scan(type(inputs)(*tensors), delta_softplus=True, reverse=True, backend="reference")

    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)
