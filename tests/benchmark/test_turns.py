from collections.abc import Callable

import pytest

from lightspine.benchmark.turns import time_in_turns


def _clock(durations_s: list[float]) -> Callable[[], float]:
    """Return a clock by which the timed calls last so long, one after the other."""
    moments = [moment for i, length in enumerate(durations_s) for moment in (1000 * i, 1000 * i + length)]
    return iter(moments).__next__


def test_every_round_calls_every_function_once() -> None:
    log: list[str] = []
    time_in_turns({name: lambda name=name: log.append(name) for name in "abc"}, repeats=4)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    # The first round is the untimed one.
    assert [sorted(calls) for calls in rounds] == [["a", "b", "c"]] * 5


def test_median_is_in_milliseconds() -> None:
    found = time_in_turns({"a": lambda: None}, repeats=5, clock=_clock([0.5, 0.1, 0.2, 0.4, 0.3]))["a"]
    assert (found.median_ms, found.calls) == pytest.approx((300, 5))


def test_function_over_its_budget_sits_out_after_three_calls() -> None:
    found = time_in_turns({"slow": lambda: None}, repeats=9, budget_s=1, clock=_clock([2.0] * 9))["slow"]
    assert found.calls == 3


def test_function_within_its_budget_takes_part_in_every_round() -> None:
    found = time_in_turns({"fast": lambda: None}, repeats=9, budget_s=1, clock=_clock([0.1] * 9))["fast"]
    assert found.calls == 9
