"""Noise of a measurement: a busy machine before it, and the spread of its calls."""

import os
from collections.abc import Mapping

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.benchmark.system import usable_processors

# Load average of other processes above which they compete for the processors of the measurement.
_BUSY_LOAD = 0.5
# Share by which the 90th percentile of the calls may exceed their median.
_LARGE_SPREAD = 0.25


def default_threads() -> int:
    """Return the threads of a benchmark: `OMP_NUM_THREADS`, or 2 if it is not set.

    The variable may list a number for each nesting level, such as "4,1"; the first one counts.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else 2


def describe_busy_machine(load: float | None, threads: int) -> str | None:
    """Return a warning if other processes compete for the processors of a measurement, else None.

    Args:
        load: load average of the last minute before the measurement; None if the system has none.
        threads: threads of the measurement.
    """
    processors = usable_processors()
    if load is None or load <= max(processors - threads, 0) + _BUSY_LOAD:
        return None
    return (
        f"the load average of the last minute is {load:.2f}: other processes compete for the {processors} "
        f"processors with the {threads} threads of the measurement, so its times are unreliable"
    )


def describe_spread(timings: Mapping[str, Timing]) -> str | None:
    """Return a warning if the calls of a measurement differ much from each other, else None.

    Args:
        timings: timings by name. Those of fewer than three calls are ignored.
    """
    excess = {
        name: timing.p90_ms / timing.median_ms - 1 for name, timing in timings.items() if timing.repeats >= 3
    }
    noisy = {name: share for name, share in excess.items() if share > _LARGE_SPREAD}
    if not noisy:
        return None
    worst = max(noisy, key=lambda name: noisy[name])
    return (
        f"the calls of {len(noisy)} of {len(timings)} measurements differ much, most of all those of {worst} "
        f"(90th percentile {100 * noisy[worst]:.0f} % above the median): the times are unreliable"
    )
