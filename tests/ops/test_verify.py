"""The comparison of kernels with the reference that `lightspine doctor --verify` runs."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightspine.ops import verify
from lightspine.ops.kernel_scan import KernelScan
from lightspine.ops.verify import OPERATORS, Check, Verification, plan_checks
from lightspine_cli.main import main


def cpu_check(name: str, dtype: torch.dtype = torch.float32) -> Check:
    [operator] = [operator for operator in OPERATORS if operator.name == name]
    return Check(operator=operator, backend="cpu", device="cpu", dtype=dtype)


def break_cross_scan(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the gradient of D that the kernels return."""
    backward = KernelScan.cross_scan_backward

    def broken(self: KernelScan, *args: Any) -> Any:
        grads = backward(self, *args)
        return grads._replace(D=change(grads.D))

    monkeypatch.setattr(KernelScan, "cross_scan_backward", broken)


def only(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(verify, "plan_checks", lambda: list(checks))


@pytest.mark.parametrize("name", [o.name for o in OPERATORS if "cpu" in o.backends])
def test_cpu_kernels_are_correct(name: str) -> None:
    result = verify.verify(cpu_check(name))
    assert result.correct, result
    assert result.first_call_s > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [c for c in plan_checks() if c.backend == "cpu"], ids=lambda c: str(c.dtype)
)
def test_cpu_kernels_are_correct_in_every_dtype(check: Check) -> None:
    result = verify.verify(check)
    assert result.correct, result


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("dtype", verify.TOLERANCE, ids=str)
def test_triton_kernels_are_correct_on_a_device(operator: Any, dtype: torch.dtype) -> None:
    result = verify.verify(Check(operator=operator, backend="triton", device="cuda", dtype=dtype))
    assert result.correct, result


def test_every_operator_is_checked_in_every_dtype() -> None:
    planned = {(check.operator.name, check.dtype) for check in plan_checks() if check.backend == "cpu"}
    names = ("selective_scan", "bidirectional_scan", "cross_scan", "projected_cross_scan")
    assert planned == {(name, dtype) for name in names for dtype in verify.TOLERANCE}


def test_every_output_and_gradient_is_compared() -> None:
    result = verify.verify(cpu_check("selective_scan"))
    tensors = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    outputs = ("output", "last state")
    assert set(result.differences) == {
        *outputs,
        *(f"{name} in inference" for name in outputs),
        *(f"grad {name}" for name in tensors),
    }


@pytest.mark.parametrize(
    ("change", "size"),
    [(lambda t: t * 1.001, "1.0e-03"), (lambda t: t * torch.nan, "inf")],
    ids=["value", "NaN"],
)
def test_wrong_gradient_is_named_with_operator_backend_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Tensor], Tensor],
    size: str,
) -> None:
    break_cross_scan(monkeypatch, change)
    only(monkeypatch, cpu_check("cross_scan"), cpu_check("selective_scan"))
    assert main(["doctor", "--verify"]) == 1
    shown = capsys.readouterr()
    sentence = f"cross_scan on cpu in float32 is off in grad D by {size}, expected 2e-06"
    assert f"1 of 2 checks of kernels failed: {sentence}" in shown.err
    [row] = [line for line in shown.out.splitlines() if line.startswith("cross_scan ")]
    assert row.rstrip().endswith("wrong")


def test_kernel_that_does_not_run_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no code for this device")

    monkeypatch.setattr(KernelScan, "cross_scan", fail)
    only(monkeypatch, cpu_check("cross_scan"))
    assert main(["doctor", "--verify"]) == 1
    assert "cross_scan on cpu in float32 failed with RuntimeError: no code" in capsys.readouterr().err


def test_correct_kernels_are_reported_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, cpu_check("cross_scan"))
    assert main(["doctor", "--verify", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["verification"]
    assert (entry["operator"], entry["backend"], entry["dtype"]) == ("cross_scan", "cpu", "float32")
    assert entry["correct"]
    assert 0 < max(entry["differences"].values()) <= entry["tolerance"] == 2e-6


def test_difference_that_is_not_a_number_is_null_in_json() -> None:
    result = Verification(
        operator="scan",
        backend="cpu",
        device="cpu",
        dtype="float32",
        tolerance=1.0,
        differences={"output": float("inf")},
        first_call_s=1.0,
    )
    assert result.as_dict()["differences"] == {"output": None}
    assert not result.correct


def test_deterministic_mode_is_restored() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    verify.verify(cpu_check("cross_scan"))
    assert torch.are_deterministic_algorithms_enabled() == before
