"""Profile a model: time per module, per module class and per PyTorch operator."""

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from lightspine.benchmark.interleaved_timing import summarize
from lightspine.benchmark.model_specs import ModelSpec
from lightspine.benchmark.noise import default_threads
from lightspine.benchmark.prepare import prepare_row
from lightspine.benchmark.settings import BenchSettings, plan_groups
from lightspine.benchmark.system import describe_system
from lightspine.errors import UsageError
from lightspine.utils.devices import check_device, synchronize, torch_threads
from lightspine.utils.files import atomic_write, atomic_write_text

PROFILE_NAME, TRACE_NAME = "profile.json", "trace.json"
ProfileMode = Literal["eager", "optimized"]

_RUN_LABEL = "lightspine.run"
_SCAN_PREFIX = "lightspine::"


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Settings of a profile.

    Attributes:
        batch: batch size.
        size: (height, width) in pixels; `None` for the size at which the authors evaluate the model.
        mode: "eager" or "optimized".
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        threads: torch threads; by default `OMP_NUM_THREADS`, or 2.
        train: profile a training step; module times are still those of its forward pass.
        repeats: runs per measurement, after two warm-up runs.
    """

    batch: int = 1
    size: tuple[int, int] | None = None
    mode: ProfileMode = "eager"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = field(default_factory=default_threads)
    train: bool = False
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class ModuleTime:
    """Time of one module in one run, in milliseconds.

    Attributes:
        name: dotted name in the model; "" is the model itself.
        kind: class name.
        total_ms: with its submodules.
        own_ms: without its submodules.
        calls: calls per run.
    """

    name: str
    kind: str
    total_ms: float
    own_ms: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """Time of one operator in one run, in milliseconds.

    Attributes:
        name: such as "aten::addmm".
        own_ms: without the operators it calls; on CUDA, time of its kernels.
        calls: calls per run.
    """

    name: str
    own_ms: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class OperatorTimes:
    """Times from PyTorch's profiler.

    Attributes:
        operators: slowest first.
        run_ms: one run, including the overhead of the profiler.
        scan_ms: the scan operators of one run, with everything they call.
    """

    operators: list[OperatorTime]
    run_ms: float
    scan_ms: float

    @property
    def scan_share(self) -> float:
        """Share of the scans in the run, 0 to 1."""
        return self.scan_ms / self.run_ms


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """The result of `profile_model`.

    Attributes:
        model: model name.
        source: "lightspine" or "timm".
        settings: the settings, with the height and width of the images.
        system: see `describe_system`.
        run_ms: median of a run without hooks and profiler.
        run_p90_ms: 90th percentile (nearest rank) of these runs.
        modules: slowest first.
        operators: slowest first, and the share of the scans.
    """

    model: str
    source: str
    settings: dict[str, Any]
    system: dict[str, Any]
    run_ms: float
    run_p90_ms: float
    modules: list[ModuleTime]
    operators: OperatorTimes

    @property
    def kinds(self) -> dict[str, float]:
        """Own milliseconds summed over all modules of a class, slowest class first."""
        kinds: dict[str, float] = defaultdict(float)
        for module in self.modules:
            kinds[module.kind] += module.own_ms
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"kinds_own_ms": self.kinds, "scan_share": self.operators.scan_share}


def profile_model(
    spec: ModelSpec,
    settings: ProfileSettings,
    folder: Path | None = None,
    *,
    on_step: Callable[[str], None] = lambda _: None,
) -> ModelProfile:
    """Profile a model: time runs without instrumentation, with module hooks, and under PyTorch's profiler.

    Args:
        spec: the model.
        settings: what to profile.
        folder: where to write `profile.json` and `trace.json` (for Perfetto and Chrome's trace viewer).
        on_step: called with the name of each step.

    Raises:
        UsageError: invalid settings, or the device is not available.
        LightspineError: the files cannot be written.
        Exception: any error of the model.
    """
    if settings.train and settings.mode != "eager":
        raise UsageError(f"expected mode eager for a training step, got {settings.mode}")
    bench_settings = BenchSettings(
        batches=(settings.batch,),
        sizes=(settings.size,),
        modes=(settings.mode,),
        dtypes=(settings.dtype,),
        device=settings.device,
        threads=settings.threads,
        repeats=settings.repeats,
    )
    check_device(settings.device)
    [[job]] = plan_groups([spec], bench_settings)
    device = torch.device(settings.device)
    with torch_threads(settings.threads):
        # Before the measurement, which raises the load average.
        system = describe_system()
        on_step("building the model")
        prepared = prepare_row(job, None, train=settings.train)
        model: nn.Module
        call: Callable[[], object]
        if prepared.train_step is not None:
            model, call = prepared.train_step.model, prepared.train_step
        else:
            assert prepared.model is not None
            model, call = prepared.model, prepared.forward

        def run() -> None:
            call()
            synchronize(device)

        on_step("timing runs")
        for _ in range(2):
            run()
        timing = summarize([_time_call(run) for _ in range(settings.repeats)])
        on_step("timing modules")
        modules = measure_modules(model, run, repeats=settings.repeats, wait=lambda: synchronize(device))
        on_step("timing operators")
        operators = measure_operators(
            run,
            repeats=settings.repeats,
            device=settings.device,
            trace=None if folder is None else folder / TRACE_NAME,
        )
    result = ModelProfile(
        model=spec.name,
        source=spec.source,
        settings=asdict(settings) | {"size": [job.row.height, job.row.width]},
        system=system,
        run_ms=timing.median_ms,
        run_p90_ms=timing.p90_ms,
        modules=modules,
        operators=operators,
    )
    if folder is not None:
        atomic_write_text(folder / PROFILE_NAME, json.dumps(result.as_dict(), indent=1) + "\n")
    return result


def measure_modules(
    model: nn.Module,
    run: Callable[[], object],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] = lambda: None,
) -> list[ModuleTime]:
    """Time every module with forward hooks, slowest first.

    The few microseconds of a hook are included in the time of the enclosing module.

    Args:
        model: its modules are timed.
        run: runs the model once.
        repeats: number of runs; the medians are returned.
        clock: returns seconds.
        wait: synchronizes the device before the clock is read.
    """
    timer = _ModuleTimer(clock, wait)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    with timer.hooks_on(model):
        for _ in range(repeats):
            timer.start_run()
            run()
    names = dict.fromkeys(name for entries in timer.runs for name in entries)
    found = [
        ModuleTime(
            name=name,
            kind=kinds[name],
            total_ms=1000 * statistics.median(entries[name].total for entries in timer.runs),
            own_ms=1000 * statistics.median(entries[name].own for entries in timer.runs),
            calls=timer.runs[-1][name].calls,
        )
        for name in names
    ]
    return sorted(found, key=lambda module: -module.total_ms)


@dataclass
class _ModuleSeconds:
    total: float = 0.0
    own: float = 0.0
    calls: int = 0


@dataclass
class _OpenCall:
    """A module call that has not returned yet."""

    start: float
    in_submodules: float = 0.0


class _ModuleTimer:
    def __init__(self, clock: Callable[[], float], wait: Callable[[], object]):
        self._clock, self._wait = clock, wait
        self._stack: list[_OpenCall] = []
        self.runs: list[dict[str, _ModuleSeconds]] = []

    def start_run(self) -> None:
        self.runs.append(defaultdict(_ModuleSeconds))

    @contextmanager
    def hooks_on(self, model: nn.Module) -> Iterator[None]:
        handles = []
        try:
            for name, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(self._before_forward))
                handles.append(module.register_forward_hook(partial(self._after_forward, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_forward(self, *_: object) -> None:
        self._wait()
        self._stack.append(_OpenCall(self._clock()))

    def _after_forward(self, name: str, *_: object) -> None:
        self._wait()
        call = self._stack.pop()
        elapsed = self._clock() - call.start
        entry = self.runs[-1][name]
        entry.total += elapsed
        entry.own += elapsed - call.in_submodules
        entry.calls += 1
        if self._stack:
            self._stack[-1].in_submodules += elapsed


def measure_operators(
    run: Callable[[], object], *, repeats: int, device: str, trace: Path | None = None
) -> OperatorTimes:
    """Time operators with PyTorch's profiler.

    Args:
        run: runs the model once and synchronizes the device.
        repeats: number of runs; the means are returned.
        device: "cpu" or "cuda".
        trace: where to write a trace for Perfetto or Chrome's trace viewer.

    Raises:
        LightspineError: the trace cannot be written.
    """
    on_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with _quiet_kineto(), profile(activities=activities) as profiler:
        for _ in range(repeats):
            with record_function(_RUN_LABEL):
                run()
    if trace is not None:
        # The profiler opens the file by its name.
        with atomic_write(trace) as file:
            profiler.export_chrome_trace(file.name)
    # On CUDA the profiler also lists each kernel and label as an event of the device, whose time is already
    # that of the operator that launched it.
    averages: list[Any] = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
    [label] = [event for event in averages if event.key == _RUN_LABEL]
    ms_per_run = 1 / (1000 * repeats)
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    total = "device_time_total" if on_cuda else "cpu_time_total"
    operators = [
        OperatorTime(
            name=event.key, own_ms=getattr(event, own) * ms_per_run, calls=round(event.count / repeats)
        )
        for event in averages
        if event is not label
    ]
    return OperatorTimes(
        operators=sorted(operators, key=lambda operator: -operator.own_ms),
        run_ms=label.cpu_time_total * ms_per_run,
        scan_ms=sum(getattr(event, total) for event in profiler.events() if _is_outer_scan(event))
        * ms_per_run,
    )


def _is_outer_scan(event: Any) -> bool:
    """Return whether an event is a scan that is not part of another scan."""
    parent = event.cpu_parent
    while parent is not None and not parent.key.startswith(_SCAN_PREFIX):
        parent = parent.cpu_parent
    return event.key.startswith(_SCAN_PREFIX) and parent is None


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Stop PyTorch's profiler from logging to standard error."""
    # Kineto reads the variable once, when it is initialized.
    is_set = "KINETO_LOG_LEVEL" in os.environ
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if not is_set:
            del os.environ["KINETO_LOG_LEVEL"]


def _time_call(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
