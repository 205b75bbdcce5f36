"""Measure a group of rows: peak memory of each row in its own process, then interleaved timing."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lightspine.benchmark.interleaved_timing import collect_durations, summarize
from lightspine.benchmark.macs import Macs
from lightspine.benchmark.memory import MemoryReading, MemoryServer, MemoryServerError, describe_failure
from lightspine.benchmark.prepare import PreparedRow, count_row_macs, prepare_row, unsupported_reason
from lightspine.benchmark.results import EXPORTED_MODES, Row
from lightspine.benchmark.settings import BenchSettings, Job
from lightspine.utils.devices import synchronize

_FORWARD, _TRAIN = "forward", "training step"
# Side of the square reference matrices: large enough for the peak rate, small enough to be fast.
_GEMM_SIDES = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class GroupTools:
    """Settings and helpers shared by all groups of a run.

    Attributes:
        settings: settings of the benchmark.
        server: measures memory; `None` if the system does not support it.
        onnx_file_of: exports the model of a row, or returns the file if it exists.
        clock: returns seconds.
        on_step: called with the current row and the number of steps done.
    """

    settings: BenchSettings
    server: MemoryServer | None
    onnx_file_of: Callable[[Job], Path]
    clock: Callable[[], float]
    on_step: Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Result of a group.

    Attributes:
        rows: in the order of the jobs.
        matmul_gflops: measured rate of a matrix product in 10^9 operations per second, by dtype.
    """

    rows: list[Row]
    matmul_gflops: dict[str, float]


class _FirstCallTimer:
    """Runs a function, and records the duration of its first call until the device has finished.

    Args:
        call: the function.
        device: device that the function runs on.
        clock: returns seconds.
    """

    def __init__(self, call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> None:
        self._call, self._device, self._clock = call, device, clock
        self.seconds: float | None = None

    def __call__(self) -> None:
        if self.seconds is not None:
            self._call()
            return
        start = self._clock()
        self._call()
        synchronize(self._device)
        self.seconds = self._clock() - start


@dataclass
class _RowInProgress:
    row: Row
    forward: _FirstCallTimer | None = None
    train_step: _FirstCallTimer | None = None

    def fail(self, error: BaseException, prefix: str = "") -> None:
        """Record the first failure of the row."""
        if self.row.status == "ok":
            status, reason = describe_failure(error)
            self.row = replace(self.row, status=status, error=prefix + reason)

    def timed_calls(self) -> dict[str, _FirstCallTimer]:
        calls = {_FORWARD: self.forward, _TRAIN: self.train_step}
        return {kind: call for kind, call in calls.items() if call is not None}

    def record_times(self, kind: str, seconds: list[float]) -> None:
        timing = summarize(seconds, batch=self.row.batch, first_call_s=self.timed_calls()[kind].seconds)
        if kind == _FORWARD:
            self.row = replace(self.row, forward=timing)
        else:
            self.row = replace(self.row, train_step=timing)


def measure_group(jobs: list[Job], tools: GroupTools) -> GroupResult:
    """Measure the memory of each row in its own process, then time all rows interleaved.

    A row that fails records the reason; the other rows continue.
    """
    macs_cache: dict[tuple[object, ...], tuple[Macs, int]] = {}
    entries = []
    for job in jobs:
        tools.on_step(f"{_describe(job.row)}: memory", 1)
        entries.append(_prepare(job, tools, macs_cache))
    matmul_gflops = _time_entries(entries, tools)
    return GroupResult(
        rows=[_with_rates(entry.row, matmul_gflops) for entry in entries], matmul_gflops=matmul_gflops
    )


def gemm_reference(device: str, dtype: str) -> Callable[[], object]:
    """Return the GEMM reference: a function that multiplies two square matrices into a third."""
    side = _GEMM_SIDES[device]
    a, b, out = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(3))

    def run() -> None:
        torch.mm(a, b, out=out)

    return run


def gemm_gflops(device: str, seconds: Sequence[float]) -> float:
    """Return the rate of `gemm_reference` in 10^9 operations per second, from the median duration.

    A multiply-add counts as two operations.
    """
    return 2 * _GEMM_SIDES[device] ** 3 / statistics.median(seconds) / 1e9


def _prepare(
    job: Job, tools: GroupTools, macs_cache: dict[tuple[object, ...], tuple[Macs, int]]
) -> _RowInProgress:
    entry = _RowInProgress(job.row)
    if reason := unsupported_reason(job.row):
        entry.row = replace(job.row, status="absent", error=reason)
        return entry
    try:
        key = (job.row.model, job.row.source, job.row.variant, job.row.height, job.row.width)
        if key not in macs_cache:
            macs_cache[key] = count_row_macs(job)
        macs, parameters = macs_cache[key]
        entry.row = replace(job.row, parameters=parameters, macs=macs.total, macs_scan=macs.scan)
        onnx_file = tools.onnx_file_of(job) if job.row.mode in EXPORTED_MODES else None
        if onnx_file is not None:
            entry.row = replace(entry.row, onnx_file_bytes=onnx_file.stat().st_size)
        if tools.server is not None:
            reading = tools.server.measure(job, onnx_file, train=tools.settings.train)
            entry.row = _with_memory(entry.row, reading)
        # A row that crashed or ran out of memory in its own process would also end this one.
        if entry.row.status == "ok" or entry.row.peak_memory_mib is not None:
            train = tools.settings.train and entry.row.status == "ok"
            prepared = prepare_row(job, onnx_file, train=train)
            device = torch.device(tools.settings.device)
            entry.forward = _FirstCallTimer(prepared.forward, device, tools.clock)
            if prepared.train_step is not None:
                entry.train_step = _FirstCallTimer(prepared.train_step, device, tools.clock)
            if device.type == "cuda":
                _measure_cuda_memory(entry, prepared)
    except MemoryServerError:
        raise
    except Exception as error:
        entry.fail(error)
    return entry


def _time_entries(entries: list[_RowInProgress], tools: GroupTools) -> dict[str, float]:
    """Time all rows interleaved with one matrix product per dtype; return the rates of the products."""
    settings, device = tools.settings, torch.device(tools.settings.device)
    owners: dict[str, tuple[_RowInProgress, str]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for i, entry in enumerate(entries):
        for kind, call in entry.timed_calls().items():
            owners[f"{i} {kind}"] = entry, kind
            calls[f"{i} {kind}"] = call
    dtypes = dict.fromkeys(entry.row.dtype for entry, _ in owners.values())
    calls |= {dtype: gemm_reference(settings.device, dtype) for dtype in dtypes}

    def on_call(name: str) -> None:
        if name in owners:
            tools.on_step(_describe(owners[name][0].row), 1)

    def on_error(name: str, error: Exception) -> None:
        if name not in owners:
            raise error
        entry, kind = owners[name]
        entry.fail(error, "" if kind == _FORWARD else f"{kind}: ")

    seconds = collect_durations(
        {name: partial(_run_synchronized, call, device) for name, call in calls.items()},
        repeats=settings.repeats,
        warmup=settings.warmup,
        budget_s=settings.budget_s,
        calls_per_turn=settings.calls_per_turn,
        clock=tools.clock,
        on_call=on_call,
        on_error=on_error,
    )
    for name, (entry, kind) in owners.items():
        if durations := seconds.get(name):
            entry.record_times(kind, durations)
    return {dtype: gemm_gflops(settings.device, seconds[dtype]) for dtype in dtypes}


def _run_synchronized(call: Callable[[], object], device: torch.device) -> None:
    call()
    synchronize(device)


def _with_memory(row: Row, reading: MemoryReading) -> Row:
    status, error = reading.status, reading.error
    if reading.train_failure is not None:
        status, error = reading.train_failure[0], f"{_TRAIN}: {reading.train_failure[1]}"
    return replace(
        row,
        status=status,
        error=error,
        peak_memory_mib=reading.forward_mib,
        train_memory_mib=reading.train_mib,
    )


def _measure_cuda_memory(entry: _RowInProgress, prepared: PreparedRow) -> None:
    assert entry.forward is not None
    forward = prepared.held_bytes + _peak_cuda_bytes(entry.forward)
    entry.row = replace(entry.row, peak_memory_mib=forward / 2**20)
    if prepared.train_step is None or entry.train_step is None:
        return
    try:
        peak = _peak_cuda_bytes(entry.train_step)
        # Only after the first step does the optimizer hold its state.
        train = prepared.train_step.held_bytes + peak
    except Exception as error:
        entry.fail(error, f"{_TRAIN}: ")
        # The forward pass is still timed.
        entry.train_step = None
    else:
        entry.row = replace(entry.row, train_memory_mib=train / 2**20)


def _peak_cuda_bytes(call: Callable[[], object]) -> int:
    """Return the peak of PyTorch's allocator during a call, minus what was allocated before it."""
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _with_rates(row: Row, matmul_gflops: dict[str, float]) -> Row:
    if row.forward is None or row.macs is None:
        return row
    rate = 2 * row.macs * row.batch / row.forward.median_ms / 1e6
    return replace(row, gflops_per_s=rate, matmul_share=rate / matmul_gflops[row.dtype])


def _describe(row: Row) -> str:
    name = f"{row.model} {row.variant}" if row.variant else row.model
    return f"{name}, {row.source}, {row.mode}, {row.dtype}, batch {row.batch}, {row.height}x{row.width}"
