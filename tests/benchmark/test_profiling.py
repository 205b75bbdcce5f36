"""Profiling of modules and operators: how times add up, with a fake clock."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import DeviceType

from lightspine.benchmark import profiling
from lightspine.benchmark.profiling import ModuleTime, measure_modules, measure_operators
from lightspine.blocks import VSSBlock


class Clock:
    """Fake clock that advances only on request."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Busy(nn.Module):
    """Module that takes some seconds before and some after its children, by the fake clock."""

    def __init__(self, clock: Clock, before: float, after: float = 0.0, *children: nn.Module):
        super().__init__()
        self.clock, self.before, self.after = clock, before, after
        self.inner = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.seconds += self.before
        for child in self.inner:
            x = child(x)
        self.clock.seconds += self.after
        return x


def _measure(model: nn.Module, clock: Clock, repeats: int = 1) -> dict[str, ModuleTime]:
    found = measure_modules(model, lambda: model(torch.zeros(1)), repeats=repeats, clock=clock)
    return {module.name: module for module in found}


def test_own_time_is_that_without_the_children() -> None:
    clock = Clock()
    model = Busy(clock, 0.001, 0.002, Busy(clock, 0.010, 0.0, Busy(clock, 0.100)), Busy(clock, 0.020))
    found = _measure(model, clock)
    assert {name: module.total_ms for name, module in found.items()} == pytest.approx(
        {"": 133, "inner.0": 110, "inner.0.inner.0": 100, "inner.1": 20}
    )
    assert {name: module.own_ms for name, module in found.items()} == pytest.approx(
        {"": 3, "inner.0": 10, "inner.0.inner.0": 100, "inner.1": 20}
    )
    # The slowest first.
    assert list(found) == ["", "inner.0", "inner.0.inner.0", "inner.1"]


def test_module_that_is_called_twice_counts_twice() -> None:
    clock = Clock()
    shared = Busy(clock, 0.005)
    found = _measure(Busy(clock, 0.0, 0.0, shared, shared), clock)
    assert (found["inner.0"].calls, found["inner.0"].total_ms) == (2, pytest.approx(10))


def test_median_of_the_passes_is_told() -> None:
    clock = Clock()
    model = Busy(clock, 0.0)
    durations = iter([0.001, 0.002, 0.009])

    def run() -> None:
        model.before = next(durations)
        model(torch.zeros(1))

    [module] = measure_modules(model, run, repeats=3, clock=clock)
    assert module.total_ms == pytest.approx(2)


def test_hooks_are_gone_afterwards_even_if_the_model_fails() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        measure_modules(model, lambda: model(torch.zeros(3)), repeats=1)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.fixture(scope="module")
def block() -> Iterator[Callable[[], Tensor]]:
    module, images = VSSBlock(16).eval(), torch.randn(1, 16, 8, 8)
    with torch.inference_mode():
        module(images)
        yield lambda: module(images)


def test_scans_are_a_part_of_the_run(block: Callable[[], Tensor]) -> None:
    found = measure_operators(block, repeats=2, device="cpu")
    assert 0 < found.scan_ms < found.run_ms
    names = {operator.name: operator.calls for operator in found.operators}
    assert names["lightspine::cross_scan"] == 1


def test_operators_without_what_they_call_add_up_to_less_than_the_run(block: Callable[[], Tensor]) -> None:
    found = measure_operators(block, repeats=2, device="cpu")
    assert sum(operator.own_ms for operator in found.operators) <= found.run_ms
    assert [operator.own_ms for operator in found.operators] == sorted(
        (operator.own_ms for operator in found.operators), reverse=True
    )


def test_run_without_scans_has_no_share_of_them() -> None:
    convolution, images = nn.Conv2d(3, 3, 1), torch.randn(1, 3, 8, 8)
    assert measure_operators(lambda: convolution(images), repeats=1, device="cpu").scan_share == 0


def event(key: str, device_type: DeviceType, own_us: float, total_us: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        device_type=device_type,
        count=1,
        self_device_time_total=own_us,
        device_time_total=total_us or own_us,
        cpu_time_total=100.0,
        cpu_parent=None,
    )


class CudaProfiler:
    """Fake profiler that returns the events of one run on a GPU: those of the host, then those of the GPU."""

    def __init__(self, **_: object) -> None:
        self.found = [
            event("lightspine.run", DeviceType.CPU, 0.0, 60.0),
            event("lightspine::cross_scan", DeviceType.CPU, 40.0),
            event("aten::mm", DeviceType.CPU, 20.0),
            event("lightspine.run", DeviceType.CUDA, 60.0),
            event("cross_scan_kernel", DeviceType.CUDA, 40.0),
            event("gemm_kernel", DeviceType.CUDA, 20.0),
        ]

    def __enter__(self) -> "CudaProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def key_averages(self) -> list[SimpleNamespace]:
        return self.found

    def events(self) -> list[SimpleNamespace]:
        return self.found


def test_kernels_of_a_gpu_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "profile", CudaProfiler)
    found = measure_operators(lambda: None, repeats=1, device="cuda")
    assert [(operator.name, operator.own_ms) for operator in found.operators] == [
        ("lightspine::cross_scan", 0.04),
        ("aten::mm", 0.02),
    ]
    assert (found.run_ms, found.scan_ms) == (0.1, 0.04)
