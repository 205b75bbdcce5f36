"""Latency of several models, measured side by side so that a busy machine is unfair to none of them."""

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
class Latency:
    """Time of one forward pass, in milliseconds.

    Attributes:
        median_ms: half of the repeats were faster.
        p90_ms: nine of ten repeats were faster.
        repeats: how many passes were timed.
    """

    median_ms: float
    p90_ms: float
    repeats: int


def measure_latency_ms(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    *,
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time one forward pass of each model in eval mode, without gradients.

    The models take turns, one pass each, `repeats` times over: a slow moment of the machine falls on all of
    them, and the medians stay comparable.

    Args:
        models: models by name, each on the device of its input; their training mode is restored.
        inputs: a `(B, C, H, W)` batch for each name.
        threads: number of torch threads during the measurement; unchanged by default.
        repeats: timed passes of each model.
        warmup: untimed passes of each model before the first timed one.
        clock: returns seconds.

    Returns:
        The latency of each model, in the order of `models`.

    Raises:
        UsageError: a model has no input, or `repeats` is not positive.
    """
    if missing := [name for name in models if name not in inputs]:
        raise UsageError(f"every model needs an input to be timed, there is none for {', '.join(missing)}")
    if repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with _eval_mode(models.values()), torch_threads(threads), torch.inference_mode():
        for round_ in range(-warmup, repeats):
            for name, model in models.items():
                elapsed = _time_once(model, inputs[name], clock)
                if round_ >= 0:
                    seconds[name].append(elapsed)
    return {name: summarise(values) for name, values in seconds.items()}


def _time_once(model: nn.Module, batch: Tensor, clock: Callable[[], float]) -> float:
    synchronize(batch.device)
    start = clock()
    model(batch)
    synchronize(batch.device)
    return clock() - start


def summarise(seconds: list[float]) -> Latency:
    """Return the median and the 90th percentile (nearest rank) of one or more durations."""
    ordered = sorted(seconds)
    return Latency(
        median_ms=1000 * statistics.median(ordered),
        p90_ms=1000 * ordered[max(0, -(-9 * len(ordered) // 10) - 1)],
        repeats=len(ordered),
    )


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
