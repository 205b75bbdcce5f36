"""Time several functions side by side: they take turns, so that a slow moment falls on all of them."""

import math
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
    calls_per_turn: int | None = None,
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
        calls_per_turn: a turn is an untimed call and so many timed ones, where functions drive each other out
            of a cache that they need: oneDNN keeps the compiled code of 1,024 operators, those of some twenty
            networks, and compiles anew what fell out. By default a turn is one timed call.
        clock: returns seconds.
        on_call: called with the name after each call, timed or not.
        on_error: called with the name and what a function raised, which then takes no further part and has no
            durations; without it the first error ends everything.

    Returns:
        Seconds of each timed call, by name.
    """
    turns = _Turns(functions, clock, on_call, on_error)
    names, draw = list(functions), random.Random(0)
    for name in names:
        for _ in range(warmup):
            turns.call(name)
    for _ in range(math.ceil(repeats / (calls_per_turn or 1))):
        draw.shuffle(names)
        for name in names:
            if calls_per_turn is not None and not turns.is_done(name, repeats, budget_s):
                turns.call(name)
            for _ in range(calls_per_turn or 1):
                if not turns.is_done(name, repeats, budget_s):
                    turns.time(name)
    return turns.seconds


class _Turns:
    """The functions that still take part, and their durations."""

    def __init__(
        self,
        functions: Mapping[str, Callable[[], object]],
        clock: Callable[[], float],
        on_call: Callable[[str], None],
        on_error: Callable[[str, Exception], None] | None,
    ):
        self.functions, self.clock, self.on_call, self.on_error = functions, clock, on_call, on_error
        self.seconds: dict[str, list[float]] = {name: [] for name in functions}

    def call(self, name: str) -> None:
        if name in self.seconds:
            self._run(name)
            self.on_call(name)

    def time(self, name: str) -> None:
        spent, start = self.seconds[name], self.clock()
        self._run(name)
        spent.append(self.clock() - start)
        self.on_call(name)

    def is_done(self, name: str, repeats: int, budget_s: float) -> bool:
        spent = self.seconds.get(name)
        return spent is None or len(spent) == repeats or (len(spent) >= 3 and sum(spent) > budget_s)

    def _run(self, name: str) -> None:
        try:
            self.functions[name]()
        except Exception as error:
            if self.on_error is None:
                raise
            del self.seconds[name]
            self.on_error(name, error)


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    budget_s: float = 10.0,
    calls_per_turn: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Call each function once untimed, then all of them in turn: see `collect_in_turns`.

    Args:
        functions: by name.
        repeats: timed calls of each.
        budget_s: seconds after which a function sits the other rounds out.
        calls_per_turn: a turn is an untimed call and so many timed ones; by default one timed call.
        clock: returns seconds.
    """
    seconds = collect_in_turns(
        functions, repeats=repeats, budget_s=budget_s, calls_per_turn=calls_per_turn, clock=clock
    )
    return {
        name: Timing(median_ms=1000 * statistics.median(spent), calls=len(spent))
        for name, spent in seconds.items()
    }
