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


def time_in_turns(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    budget_s: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Call each function once untimed, then all of them in turn, `repeats` times over.

    The order is drawn anew for each round, so that no function always runs in the caches that the same other
    one has left behind.

    Args:
        functions: by name.
        repeats: timed calls of each.
        budget_s: a function that has spent so many seconds in at least three timed calls sits the other
            rounds out.
        clock: returns seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    names, draw = list(functions), random.Random(0)
    for _ in range(repeats):
        draw.shuffle(names)
        for name in names:
            spent = seconds[name]
            if len(spent) >= 3 and sum(spent) > budget_s:
                continue
            start = clock()
            functions[name]()
            spent.append(clock() - start)
    return {
        name: Timing(median_ms=1000 * statistics.median(spent), calls=len(spent))
        for name, spent in seconds.items()
    }
