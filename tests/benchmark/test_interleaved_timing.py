from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

from lightspine.benchmark.interleaved_timing import (
    collect_durations,
    measure_latency_ms,
    summarize,
    time_interleaved,
)
from lightspine.errors import UsageError


def _clock(durations_s: list[float]) -> Callable[[], float]:
    """Return a fake clock that gives consecutive timed calls these durations."""
    moments = [moment for i, length in enumerate(durations_s) for moment in (1000 * i, 1000 * i + length)]
    return iter(moments).__next__


def test_every_round_calls_every_function_once() -> None:
    log: list[str] = []
    time_interleaved({name: lambda name=name: log.append(name) for name in "abc"}, repeats=4)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    # The first round is the untimed one.
    assert [sorted(calls) for calls in rounds] == [["a", "b", "c"]] * 5


def test_turn_of_several_calls_starts_with_an_untimed_one() -> None:
    log: list[str] = []
    functions = {name: lambda name=name: log.append(name) for name in "ab"}
    found = time_interleaved(functions, repeats=6, calls_per_turn=3)
    turns = ["".join(log[i : i + 4]) for i in range(2, len(log), 4)]
    assert sorted(turns) == ["aaaa", "aaaa", "bbbb", "bbbb"]
    assert [timing.repeats for timing in found.values()] == [6, 6]


def test_median_is_in_milliseconds() -> None:
    found = time_interleaved({"a": lambda: None}, repeats=5, clock=_clock([0.5, 0.1, 0.2, 0.4, 0.3]))["a"]
    assert (found.median_ms, found.repeats) == pytest.approx((300, 5))


def test_function_over_its_budget_sits_out_after_three_calls() -> None:
    found = time_interleaved({"slow": lambda: None}, repeats=9, budget_s=1, clock=_clock([2.0] * 9))["slow"]
    assert found.repeats == 3


def test_function_within_its_budget_takes_part_in_every_round() -> None:
    found = time_interleaved({"fast": lambda: None}, repeats=9, budget_s=1, clock=_clock([0.1] * 9))["fast"]
    assert found.repeats == 9


def test_warm_up_is_not_timed() -> None:
    log: list[str] = []
    found = collect_durations(
        {"a": lambda: log.append("a")}, repeats=2, warmup=3, clock=_clock([0.5, 0.1]), on_call=log.append
    )
    assert found["a"] == pytest.approx([0.5, 0.1])
    assert log == ["a", "a"] * 5


def test_order_is_drawn_anew_in_each_round() -> None:
    log: list[str] = []
    collect_durations({name: lambda name=name: log.append(name) for name in "abcd"}, repeats=8, warmup=0)
    rounds = {tuple(log[i : i + 4]) for i in range(0, len(log), 4)}
    assert len(rounds) > 1


def test_function_that_fails_leaves_and_the_others_go_on() -> None:
    calls = {"good": 0, "bad": 0}
    failures: list[tuple[str, str]] = []

    def good() -> None:
        calls["good"] += 1

    def bad() -> None:
        calls["bad"] += 1
        if calls["bad"] == 3:
            raise RuntimeError("worn out")

    found = collect_durations(
        {"good": good, "bad": bad},
        repeats=4,
        warmup=1,
        on_error=lambda name, error: failures.append((name, str(error))),
    )
    assert failures == [("bad", "worn out")]
    assert (list(found), len(found["good"]), calls) == (["good"], 4, {"good": 5, "bad": 3})


def test_first_failure_ends_everything_where_nobody_takes_it() -> None:
    def bad() -> None:
        raise RuntimeError("worn out")

    with pytest.raises(RuntimeError, match="worn out"):
        collect_durations({"bad": bad}, repeats=1)


def test_turn_of_several_calls_begins_with_an_untimed_one() -> None:
    log: list[str] = []
    clock = _clock([0.5, 0.1, 0.3, 0.2])
    found = collect_durations(
        {"a": lambda: log.append("a")}, repeats=4, warmup=0, calls_per_turn=3, clock=clock
    )
    assert found == {"a": pytest.approx([0.5, 0.1, 0.3, 0.2])}
    assert len(log) == (1 + 3) + (1 + 1)


class Recorder(nn.Module):
    """Module that appends its name to a shared log in every forward pass."""

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
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert [sorted(passes) for passes in rounds] == [["a", "b", "c"]] * 4


def test_median_and_p90_are_those_of_the_durations() -> None:
    # 1, 2, ..., 10 ms.
    found = summarize([0.001 * step for step in range(10, 0, -1)])
    assert (found.median_ms, found.p90_ms, found.repeats) == pytest.approx((5.5, 9.0, 10))
    assert found.images_per_s is None


def test_p99_is_the_slowest_but_one_of_a_hundred_calls() -> None:
    found = summarize([0.001 * step for step in range(100, 0, -1)])
    assert (found.p90_ms, found.p99_ms) == pytest.approx((90.0, 99.0))


def test_images_per_second_are_the_batch_over_the_median() -> None:
    assert summarize([0.02, 0.01, 0.05], batch=4).images_per_s == pytest.approx(200)


class SlowFirstPass(nn.Module):
    """Module that takes 1 s in its first forward pass and 20 ms afterwards, by a fake clock."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.passes = 0.0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.seconds += 1.0 if self.passes == 1 else 0.02
        return x


def test_warm_up_pass_is_not_in_the_latency() -> None:
    model = SlowFirstPass()
    found = measure_latency_ms({"a": model}, _inputs(), repeats=3, warmup=1, clock=lambda: model.seconds)["a"]
    assert (found.median_ms, found.p90_ms, found.repeats) == pytest.approx((20, 20, 3))


def test_training_mode_is_restored() -> None:
    log: list[str] = []
    models = _models(log)
    models["a"].train()
    models["b"].eval()
    measure_latency_ms(models, _inputs(), repeats=1, warmup=0)
    assert (models["a"].training, models["b"].training) == (True, False)
    assert sorted(log) == ["a", "b", "c"]


def test_thread_count_is_restored_after_a_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency_ms({"a": nn.Linear(3, 3)}, {"a": torch.zeros(2)}, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_model_without_input_is_named() -> None:
    with pytest.raises(UsageError, match="got none for lonely"):
        measure_latency_ms({"lonely": nn.Identity()}, {})


def test_no_repeat_is_refused() -> None:
    with pytest.raises(UsageError, match="repeats must be at least 1, got 0"):
        measure_latency_ms({"a": nn.Identity()}, _inputs(), repeats=0)
