"""Warnings about a busy machine and noisy calls, and the default number of threads."""

import pytest

from lightspine.benchmark import Timing, noise
from lightspine.benchmark.noise import default_threads, describe_busy_machine, describe_spread
from lightspine.benchmark.profiling import ProfileSettings
from lightspine.benchmark.settings import BenchSettings


def timing(median_ms: float, p90_ms: float, repeats: int = 15) -> Timing:
    return Timing(median_ms=median_ms, p90_ms=p90_ms, repeats=repeats)


@pytest.mark.parametrize(
    ("value", "threads"), [("3", 3), ("4,1", 4), (None, 2), ("", 2), ("0", 2), ("many", 2)]
)
def test_threads_are_those_of_the_environment(
    value: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == BenchSettings().threads == ProfileSettings().threads == threads


@pytest.mark.parametrize(
    ("load", "processors", "threads", "busy"),
    [
        (0.4, 2, 2, False),
        (0.6, 2, 2, True),
        (1.4, 2, 1, False),
        (40.0, 64, 2, False),
        (63.0, 64, 2, True),
        (None, 2, 2, False),
    ],
)
def test_machine_is_busy_if_no_processor_is_free_for_the_threads(
    load: float | None, processors: int, threads: int, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "usable_processors", lambda: processors)
    message = describe_busy_machine(load, threads)
    assert (message is not None) == busy
    if message:
        assert f"load average of the last minute is {load:.2f}" in message


def test_largest_spread_of_the_calls_is_named() -> None:
    timings = {"a": timing(10, 11), "b": timing(10, 14), "c": timing(10, 18), "d": timing(10, 90, repeats=2)}
    message = describe_spread(timings)
    assert message is not None
    assert "2 of 4 measurements" in message
    assert "those of c (90th percentile 80 % above the median)" in message


def test_steady_calls_are_not_mentioned() -> None:
    assert describe_spread({"a": timing(10, 11)}) is None
    assert describe_spread({}) is None
