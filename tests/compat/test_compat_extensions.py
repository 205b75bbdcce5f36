"""`fwd` and `bwd` of the extension modules, called as VMamba and mamba_ssm call them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.compat import cuda_extensions as extensions
from lightspine.compat.modules import MODULES
from lightspine.errors import UsageError
from support.mamba_definitions import define_scan, draw, values_and_gradients
from support.reference import assert_close

BATCH, DIM, LENGTH = 2, 6, 21
NAMES = [name for name in MODULES if name.startswith("selective_scan_cuda_")]


class Caller(torch.autograd.Function):
    """An autograd function around an extension module, as in VMamba."""

    @staticmethod
    def forward(ctx: Any, name: str, options: tuple, *tensors: Tensor) -> Tensor:
        ctx.name = name
        out, states = MODULES[name]["fwd"](*tensors, True, *options)
        ctx.save_for_backward(*tensors, states)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        *tensors, states = ctx.saved_tensors
        return None, None, *MODULES[ctx.name]["bwd"](*tensors, dout, states, True, 1)


def tensors(states: int, delta_dim: int = DIM) -> dict[str, Tensor]:
    return {
        "u": draw(BATCH, DIM, LENGTH),
        "delta": 0.5 * draw(BATCH, delta_dim, LENGTH, seed=1),
        "A": -torch.exp(0.5 * draw(DIM, states)),
        "B": draw(BATCH, 3, states, LENGTH, seed=2),
        "C": draw(BATCH, 3, states, LENGTH, seed=3),
        "D": draw(DIM),
        "delta_bias": draw(delta_dim, seed=5) - 1,
    }


def call(name: str, options: tuple = (1,)) -> Any:
    return lambda **leaves: Caller.apply(name, options, *leaves.values())


def define(**leaves: Tensor) -> Tensor:
    """The scan, also for one channel of delta per several channels and without an axis of states."""
    if leaves["A"].dim() == 1:
        leaves |= {"A": leaves["A"][:, None], "B": leaves["B"][:, :, None], "C": leaves["C"][:, :, None]}
    repeats = DIM // leaves["delta"].shape[1]
    leaves["delta"] = leaves["delta"].repeat_interleave(repeats, 1)
    leaves["delta_bias"] = leaves["delta_bias"].repeat_interleave(repeats)
    return define_scan(**leaves, delta_softplus=True)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert_close(name, value, expected[name], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str) -> None:
    given = tensors(1 if name.endswith("ndstate") else 4)
    if name.endswith("ndstate"):
        given |= {"A": given["A"][:, 0], "B": given["B"][:, :, 0], "C": given["C"][:, :, 0]}
    options = (1, True) if name.endswith("oflex") else (1,)
    assert_same(values_and_gradients(call(name, options), given), values_and_gradients(define, given))


def test_several_channels_share_a_channel_of_delta() -> None:
    given = tensors(2, delta_dim=2)
    assert_same(
        values_and_gradients(call("selective_scan_cuda_oflex"), given), values_and_gradients(define, given)
    )


@pytest.mark.parametrize(("out_float", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_oflex_returns_float32_on_request(out_float: bool, expected: torch.dtype) -> None:
    given = {
        name: t.to(torch.float32 if name in ("A", "D", "delta_bias") else torch.bfloat16).requires_grad_()
        for name, t in tensors(1).items()
    }
    out = call("selective_scan_cuda_oflex", (1, out_float))(**given)
    out.sum().backward()
    assert out.dtype == expected
    exact = {name: t.detach().double() for name, t in given.items()}
    assert_close("out", out, define(**exact), 1e-6 if out_float else 4e-3)
    for name, t in given.items():
        assert t.grad is not None, name
        assert t.grad.dtype == t.dtype


def test_states_end_with_the_last_one() -> None:
    given = tensors(2)
    long = {name: t.repeat_interleave(100, -1) if t.dim() > 2 else t for name, t in given.items()}
    _, states = extensions.core_fwd(*long.values(), True)
    assert states.shape == (BATCH, DIM, 2, 4)
    # The last output, with C reading one state.
    long["D"] = torch.zeros(DIM).double()
    for n in range(2):
        long["C"] = torch.zeros_like(long["B"])
        long["C"][:, :, n] = 1
        assert_close("state", states[:, :, -1, 1 + 2 * n], define(**long)[..., -1], 1e-10)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_extension_of_mamba_ssm(gated: bool, constant: bool) -> None:
    given = tensors(4)
    if constant:
        given |= {"B": draw(DIM, 4), "C": draw(BATCH, 2, 4, LENGTH)}
    if gated:
        given["z"] = draw(BATCH, DIM, LENGTH, seed=8)
    expected = values_and_gradients(define_scan, given, delta_softplus=True)
    u, delta, A, B, C, D, bias = (given[name] for name in list(given)[:7])
    z, dout = given.get("z"), draw(BATCH, DIM, LENGTH, seed=9)
    out, states, *rest = extensions.mamba_fwd(u, delta, A, B, C, D, z, bias, True)
    assert_close("out", rest[0] if gated else out, expected["out"], 1e-12)
    dz = torch.empty_like(u) if gated else None
    *grads, last = extensions.mamba_bwd(u, delta, A, B, C, D, z, bias, dout, states, out, dz, True, gated) + (
        [] if gated else [None]
    )
    names = ["u", "delta", "A", "B", "C", "D", "delta_bias", *(["z"] if gated else [])]
    assert len(grads) == len(names)
    for name, grad in zip(names, grads, strict=True):
        assert_close(name, grad, expected[name], 1e-12)
    if gated:
        assert grads[-1] is dz
        assert_close("gated output", last, expected["out"], 1e-12)


def test_gate_of_bfloat16_is_applied_before_rounding() -> None:
    given = {name: t.bfloat16() if t.dim() > 2 else t.float() for name, t in tensors(4).items()}
    u, delta, A, B, C, D, bias = given.values()
    z = draw(BATCH, DIM, LENGTH, seed=8).bfloat16()
    out, _, gated = extensions.mamba_fwd(u, delta, A, B, C, D, z, bias, True)
    assert (out.dtype, gated.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = define(**{name: t.double() for name, t in given.items()}) * F.silu(z.double())
    assert_close("gated output", gated, exact, 2e-3)


def test_gradients_that_are_not_needed_are_none() -> None:
    given = {**tensors(4), "D": None, "delta_bias": None}
    grads = extensions.core_bwd(*given.values(), draw(BATCH, DIM, LENGTH), None, True, 1)
    assert [grad is None for grad in grads] == [False] * 5 + [True] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_caller_is_one_graph() -> None:
    given = [t.float().requires_grad_() for t in tensors(1).values()]

    def run(*leaves: Tensor) -> Tensor:
        return Caller.apply("selective_scan_cuda_oflex", (1, True), *leaves).square()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(run(*given).sum(), given)
    for actual, wanted in zip(torch.autograd.grad(compiled(*given).sum(), given), expected, strict=True):
        assert_close("gradient", actual, wanted, 1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"A": torch.ones(DIM, 4, dtype=torch.complex64)},
            "expects a real state matrix A, received complex64",
        ),
        ({"delta": draw(BATCH, 4, LENGTH)}, r"delta of shape \(B, D, L\) or \(B, D / r, L\), received"),
        ({"B": draw(BATCH, 4, LENGTH, 3)}, "selective_scan expects"),
    ],
)
def test_wrong_arguments(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        extensions.core_fwd(*(tensors(4) | changed).values(), True)


def test_wrong_gradient_and_wrong_axes() -> None:
    with pytest.raises(UsageError, match=r"dout of shape \(2, 6, 21\), received \(2, 6, 4\)"):
        extensions.core_bwd(*tensors(4).values(), draw(BATCH, DIM, 4), None, True, 1)
    with pytest.raises(UsageError, match=r"expects A of shape \(D,\), B and C of shape \(B, G, L\)"):
        extensions.ndstate_fwd(*tensors(1).values(), True)
    *given, bias = tensors(4).values()
    with pytest.raises(UsageError, match="expects z and out where recompute_out_z is set"):
        extensions.mamba_bwd(*given, None, bias, given[0], None, None, None, True, True)
