"""`projected_cross_scan`: the cross scan that includes the projection of dt."""

import pytest
import torch
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.cross_scan import cross_scan, projected_cross_scan, projected_cross_scan_op
from support.reference import relative_l2

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    height: int = 5, width: int = 7, dim: int = 20, rank: int = 3, states: int = 1, batch: int = 2
) -> Inputs:
    torch.manual_seed(0)
    return (
        torch.randn(batch, height, width, dim),
        torch.randn(batch, height, width, 4, rank + 2 * states),
        torch.randn(4, rank, dim),
        -torch.rand(4, dim, states) - 0.1,
        torch.randn(4, dim),
        torch.randn(4, dim),
    )


def by_two_steps(x: Tensor, projected: Tensor, weight: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """Compute dt in float64, then run the reference scan."""
    x, projected, weight, A, D, bias = (t.double() for t in (x, projected, weight, A, D, bias))
    rank, states = weight.shape[1], A.shape[2]
    dt, B, C = projected.split([rank, states, states], dim=-1)
    delta = torch.einsum("bhwkr,krd->bhwkd", dt, weight)
    return cross_scan(x, delta, A, B, C, D, bias, backend="reference")


@pytest.mark.parametrize(
    "sizes",
    [
        {"height": 1, "width": 1},
        {"height": 1, "width": 3, "dim": 16, "rank": 1},
        {"height": 9, "width": 15, "dim": 37, "rank": 7},
        {"height": 6, "width": 4, "dim": 5, "states": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_projection_and_scan(sizes: dict[str, int], dtype: torch.dtype) -> None:
    inputs = tuple(t.to(dtype) for t in make_inputs(**sizes))
    actual = projected_cross_scan(*inputs)
    assert actual.dtype == dtype
    assert relative_l2(actual, by_two_steps(*inputs)) < (2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reads_reduced_precision_and_gives_float32(dtype: torch.dtype) -> None:
    x, projected, *parameters = make_inputs()
    x, projected = x.to(dtype), projected.to(dtype)
    actual = projected_cross_scan(x, projected, *parameters)
    assert actual.dtype == torch.float32
    assert relative_l2(actual, by_two_steps(x, projected, *parameters)) < 2e-6


def test_gradients_are_those_of_projection_and_scan() -> None:
    inputs = [t.requires_grad_() for t in make_inputs()]
    by_two_steps(*inputs).sum().backward()
    expected = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    projected_cross_scan(*inputs).sum().backward()
    for t, grad in zip(inputs, expected, strict=True):
        assert relative_l2(t.grad, grad) < 1e-5


def test_several_threads_give_the_same() -> None:
    inputs = make_inputs(height=20, width=30, dim=40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = projected_cross_scan(*inputs)
        torch.set_num_threads(3)
        assert torch.equal(projected_cross_scan(*inputs), expected)
    finally:
        torch.set_num_threads(before)


def test_operator_keeps_the_rules_of_pytorch() -> None:
    torch.library.opcheck(projected_cross_scan_op, (*make_inputs(), "cross2d"))


def test_weight_of_a_wrong_shape_is_refused() -> None:
    x, projected, weight, *rest = make_inputs()
    with pytest.raises(UsageError, match=r"expects dt_weight of shape \(4, 3, 20\), received \(4, 3, 19\)"):
        projected_cross_scan(x, projected, weight[:, :, :-1], *rest)


def test_projection_of_another_map_is_refused() -> None:
    x, projected, *rest = make_inputs()
    with pytest.raises(
        UsageError, match=r"expects delta of shape \(2, 5, 7, 4, 3\), received \(2, 4, 7, 4, 3\)"
    ):
        projected_cross_scan(x, projected[:, 1:], *rest)
