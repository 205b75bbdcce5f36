import pytest
import torch
import torch.nn as nn

from lightspine.benchmark import measure_latency_ms
from lightspine.errors import UsageError


class Recorder(nn.Module):
    """Writes its name into a shared log at every pass."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(self.name + (" train" if self.training else ""))
        return x


def _models(log: list[str]) -> dict[str, nn.Module]:
    return {name: Recorder(name, log) for name in ("a", "b", "c")}


def _inputs() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1, 3, 4, 4) for name in ("a", "b", "c")}


def test_models_take_turns() -> None:
    log: list[str] = []
    measure_latency_ms(_models(log), _inputs(), repeats=3, warmup=1)
    assert log == ["a", "b", "c"] * 4


def test_median_and_p90_come_from_the_timed_passes_only() -> None:
    # One second for the pass of the warm-up, then 1, 2, ..., 10 ms.
    durations = [1.0, *(0.001 * step for step in range(1, 11))]
    moments = [
        moment for start, length in enumerate(durations) for moment in (start * 10, start * 10 + length)
    ]
    found = measure_latency_ms(
        {"a": nn.Identity()}, _inputs(), repeats=10, warmup=1, clock=iter(moments).__next__
    )["a"]
    assert (found.median_ms, found.p90_ms, found.repeats) == pytest.approx((5.5, 9.0, 10))


def test_training_mode_is_restored() -> None:
    log: list[str] = []
    models = _models(log)
    models["a"].train()
    models["b"].eval()
    measure_latency_ms(models, _inputs(), repeats=1, warmup=0)
    assert (models["a"].training, models["b"].training) == (True, False)
    assert log == ["a", "b", "c"]


def test_thread_count_is_restored_after_a_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency_ms({"a": nn.Linear(3, 3)}, {"a": torch.zeros(2)}, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_model_without_input_is_named() -> None:
    with pytest.raises(UsageError, match="there is none for lonely"):
        measure_latency_ms({"lonely": nn.Identity()}, {})


def test_no_repeat_is_refused() -> None:
    with pytest.raises(UsageError, match="repeats must be at least 1, got 0"):
        measure_latency_ms({"a": nn.Identity()}, _inputs(), repeats=0)
