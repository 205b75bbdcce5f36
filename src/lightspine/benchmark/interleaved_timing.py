"""Interleaved timing: functions are timed in alternation, so that machine noise affects all of them."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.utils.devices import synchronize, torch_threads


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Duration of one call, from repeated calls.

    Attributes:
        median_ms: median in milliseconds.
        p90_ms: 90th percentile (nearest rank) in milliseconds.
        repeats: number of timed calls.
        images_per_s: batch size divided by the median; `None` if the call does not process a batch.
        p99_ms: 99th percentile (nearest rank), the slowest call of fewer than 100; `None` in older results.
        first_call_s: seconds of the first call, a warm-up call if there are any; `None` if not measured.
    """

    median_ms: float
    p90_ms: float
    repeats: int
    images_per_s: float | None = None
    p99_ms: float | None = None
    first_call_s: float | None = None


def summarize(seconds: list[float], *, batch: int | None = None, first_call_s: float | None = None) -> Timing:
    """Return median, 90th and 99th percentile of one or more durations.

    Args:
        seconds: duration of each call.
        batch: images per call, to compute `images_per_s`.
        first_call_s: duration of the first call.
    """
    ordered = sorted(seconds)
    median_ms = 1000 * statistics.median(ordered)
    return Timing(
        median_ms=median_ms,
        p90_ms=1000 * _percentile(ordered, 90),
        p99_ms=1000 * _percentile(ordered, 99),
        repeats=len(ordered),
        images_per_s=None if batch is None else 1000 * batch / median_ms,
        first_call_s=first_call_s,
    )


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def collect_durations(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    budget_s: float = 10.0,
    calls_per_turn: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    timer: Callable[[Callable[[], object]], float] | None = None,
    on_call: Callable[[str], None] = lambda _: None,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Warm up each function, then time all of them in alternating rounds and return every duration.

    The order is shuffled in each round, so that no function always runs on the caches of the same other one.

    Args:
        functions: functions by name.
        repeats: timed calls of each function.
        warmup: untimed calls of each function before the first timed one.
        budget_s: stop calling a function after this many seconds in three or more timed calls.
        calls_per_turn: timed calls of a function in each round, after one untimed call. Use it for functions
            that evict each other from a cache: oneDNN caches the compiled code of 1,024 operators, which is
            about twenty networks. By default each round has one timed call and no untimed one.
        clock: returns seconds.
        timer: runs a function and returns its seconds, in place of `clock`, such as those of a GPU's events.
        on_call: called with the name after each call, timed or not.
        on_error: called with the name and the exception of a function that failed, which is then dropped. By
            default the exception is raised.

    Returns:
        Seconds of each timed call, by name, without functions that failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name, timed in _schedule(list(functions), repeats, warmup, calls_per_turn):
        spent = seconds.get(name)
        if spent is None or len(spent) == repeats or (len(spent) >= 3 and sum(spent) > budget_s):
            continue
        try:
            duration = timer(functions[name]) if timed and timer else _run(functions[name], clock, timed)
        except Exception as error:
            if on_error is None:
                raise
            del seconds[name]
            on_error(name, error)
        else:
            if timed:
                spent.append(duration)
        on_call(name)
    return seconds


def _run(function: Callable[[], object], clock: Callable[[], float], timed: bool) -> float:
    start = clock() if timed else 0.0
    function()
    return clock() - start if timed else 0.0


def _schedule(
    names: list[str], repeats: int, warmup: int, calls_per_turn: int | None
) -> Iterator[tuple[str, bool]]:
    """Yield the name of each call and whether it is timed."""
    for name in names:
        yield from [(name, False)] * warmup
    shuffler = random.Random(0)
    for _ in range(math.ceil(repeats / (calls_per_turn or 1))):
        shuffler.shuffle(names)
        for name in names:
            if calls_per_turn is not None:
                yield name, False
            yield from [(name, True)] * (calls_per_turn or 1)


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    budget_s: float = 10.0,
    calls_per_turn: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Time functions in alternation and return a `Timing` of each; see `collect_durations` for the arguments.

    Example:
        >>> times = time_interleaved({"sum": lambda: sum(range(100))}, repeats=3)
        >>> times["sum"].repeats
        3
    """
    seconds = collect_durations(
        functions,
        repeats=repeats,
        warmup=warmup,
        budget_s=budget_s,
        calls_per_turn=calls_per_turn,
        clock=clock,
        timer=timer,
    )
    return {name: summarize(durations) for name, durations in seconds.items()}


def measure_latency_ms(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    *,
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the forward passes of several models, interleaved, in eval mode and without gradients.

    Args:
        models: models by name, each on the device of its input; their training mode is restored.
        inputs: a `(B, C, H, W)` batch for each name.
        threads: number of torch threads during the measurement; unchanged by default.
        repeats: timed passes of each model.
        warmup: untimed passes of each model before the first timed one.
        clock: returns seconds.

    Returns:
        The timing of each model, in the order of `models`.

    Raises:
        UsageError: a model has no input, or `repeats` is not positive.
    """
    if missing := [name for name in models if name not in inputs]:
        raise UsageError(f"expected an input for every model, got none for {', '.join(missing)}")
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")

    def forward(name: str) -> Callable[[], object]:
        def run() -> None:
            models[name](inputs[name])
            synchronize(inputs[name].device)

        return run

    with _eval_mode(models.values()), torch_threads(threads), torch.inference_mode():
        seconds = collect_durations(
            {name: forward(name) for name in models},
            repeats=repeats,
            warmup=warmup,
            budget_s=math.inf,
            clock=clock,
        )
    return {name: summarize(durations, batch=len(inputs[name])) for name, durations in seconds.items()}


@contextmanager
def _eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    training = {module: module.training for model in models for module in model.modules()}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
