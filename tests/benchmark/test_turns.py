from collections.abc import Callable

import pytest

from lightspine.benchmark.turns import collect_in_turns, time_in_turns


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


def test_turn_of_several_calls_starts_with_an_untimed_one() -> None:
    log: list[str] = []
    functions = {name: lambda name=name: log.append(name) for name in "ab"}
    found = time_in_turns(functions, repeats=6, calls_per_turn=3)
    turns = ["".join(log[i : i + 4]) for i in range(2, len(log), 4)]
    assert sorted(turns) == ["aaaa", "aaaa", "bbbb", "bbbb"]
    assert [timing.calls for timing in found.values()] == [6, 6]


def test_median_is_in_milliseconds() -> None:
    found = time_in_turns({"a": lambda: None}, repeats=5, clock=_clock([0.5, 0.1, 0.2, 0.4, 0.3]))["a"]
    assert (found.median_ms, found.calls) == pytest.approx((300, 5))


def test_function_over_its_budget_sits_out_after_three_calls() -> None:
    found = time_in_turns({"slow": lambda: None}, repeats=9, budget_s=1, clock=_clock([2.0] * 9))["slow"]
    assert found.calls == 3


def test_function_within_its_budget_takes_part_in_every_round() -> None:
    found = time_in_turns({"fast": lambda: None}, repeats=9, budget_s=1, clock=_clock([0.1] * 9))["fast"]
    assert found.calls == 9


def test_warm_up_is_not_timed() -> None:
    log: list[str] = []
    found = collect_in_turns(
        {"a": lambda: log.append("a")}, repeats=2, warmup=3, clock=_clock([0.5, 0.1]), on_call=log.append
    )
    assert found["a"] == pytest.approx([0.5, 0.1])
    assert log == ["a", "a"] * 5


def test_order_is_drawn_anew_in_each_round() -> None:
    log: list[str] = []
    collect_in_turns({name: lambda name=name: log.append(name) for name in "abcd"}, repeats=8, warmup=0)
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

    found = collect_in_turns(
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
        collect_in_turns({"bad": bad}, repeats=1)


def test_turn_of_several_calls_begins_with_an_untimed_one() -> None:
    log: list[str] = []
    clock = _clock([0.5, 0.1, 0.3, 0.2])
    found = collect_in_turns(
        {"a": lambda: log.append("a")}, repeats=4, warmup=0, calls_per_turn=3, clock=clock
    )
    assert found == {"a": pytest.approx([0.5, 0.1, 0.3, 0.2])}
    assert len(log) == (1 + 3) + (1 + 1)
