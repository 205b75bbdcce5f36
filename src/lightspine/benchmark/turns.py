"""Time several functions side by side: they take turns, so that a slow moment falls on all of them."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one call.

    Attributes:
        median_ms: half of the calls were faster.
        calls: how many were timed.
    """

    median_ms: float
    calls: int


def collect_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    budget_s: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
    on_call: Callable[[str], None] = lambda _: None,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Call each function untimed, then all of them in turn, `repeats` times over; return all durations.

    The order is drawn anew for each round, so that no function always runs in the caches that the same other
    one has left behind.

    Args:
        functions: by name.
        repeats: timed calls of each.
        warmup: untimed calls of each before the first timed one.
        budget_s: a function that has spent so many seconds in at least three timed calls sits the other
            rounds out.
        clock: returns seconds.
        on_call: called with the name after each call, timed or not.
        on_error: called with the name and what a function raised, which then takes no further part and has no
            durations; without it the first error ends everything.

    Returns:
        Seconds of each timed call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}

    def call(name: str) -> None:
        try:
            functions[name]()
        except Exception as error:
            if on_error is None:
                raise
            del seconds[name]
            on_error(name, error)

    names, draw = list(functions), random.Random(0)
    for name in names:
        for _ in range(warmup):
            if name in seconds:
                call(name)
                on_call(name)
    for _ in range(repeats):
        draw.shuffle(names)
        for name in names:
            spent = seconds.get(name)
            if spent is None or (len(spent) >= 3 and sum(spent) > budget_s):
                continue
            start = clock()
            call(name)
            spent.append(clock() - start)
            on_call(name)
    return seconds


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    budget_s: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Call each function once untimed, then all of them in turn: see `collect_in_turns`.

    Args:
        functions: by name.
        repeats: timed calls of each.
        budget_s: seconds after which a function sits the other rounds out.
        clock: returns seconds.
    """
    seconds = collect_in_turns(functions, repeats=repeats, budget_s=budget_s, clock=clock)
    return {
        name: Timing(median_ms=1000 * statistics.median(spent), calls=len(spent))
        for name, spent in seconds.items()
    }
