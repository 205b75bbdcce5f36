"""One group: the rows that take turns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lightspine.benchmark.latency import summarise
from lightspine.benchmark.macs import Macs
from lightspine.benchmark.models.failures import describe_failure
from lightspine.benchmark.models.matmul import matrix_product, product_gflops
from lightspine.benchmark.models.memory import MemoryReading, MemoryServer, MemoryServerError
from lightspine.benchmark.models.prepare import Prepared, count_row_macs, prepare, why_impossible
from lightspine.benchmark.models.settings import BenchSettings, Job
from lightspine.benchmark.results import Pass, Row
from lightspine.benchmark.turns import collect_in_turns
from lightspine.utils.devices import synchronize

_FORWARD, _TRAIN = "forward", "training step"


@dataclass(frozen=True, kw_only=True)
class GroupTools:
    """What the groups of a run share.

    Attributes:
        settings: how to measure.
        server: tries each row in a process of its own; `None` where the system cannot.
        onnx_file_of: exports a row's model, or returns the file that is there.
        clock: returns seconds.
        on_step: called with what is going on and how many steps are done with it.
        calls: calls of each row, untimed ones included.
    """

    settings: BenchSettings
    server: MemoryServer | None
    onnx_file_of: Callable[[Job], Path]
    clock: Callable[[], float]
    on_step: Callable[[str, int], None]
    calls: int


@dataclass
class _Entry:
    """A row on its way."""

    row: Row
    prepared: Prepared | None = None

    def fail(self, error: BaseException, what: str = "") -> None:
        """Note the first failure of the row."""
        if self.row.status == "ok":
            status, sentence = describe_failure(error)
            self.row = replace(self.row, status=status, error=what + sentence)

    def calls(self) -> dict[str, Callable[[], object]]:
        """Return what there is to time, by kind."""
        if self.prepared is None:
            return {}
        step = self.prepared.train_step
        return {_FORWARD: self.prepared.forward} | ({} if step is None else {_TRAIN: step})

    def note_times(self, kind: str, seconds: list[float]) -> None:
        """Put the times of the forward pass or of the training step into the row."""
        found = summarise(seconds)
        times = Pass(
            median_ms=found.median_ms,
            p90_ms=found.p90_ms,
            repeats=found.repeats,
            images_per_s=1000 * self.row.batch / found.median_ms,
        )
        if kind == _FORWARD:
            self.row = replace(self.row, forward=times)
        else:
            self.row = replace(self.row, train_step=times)


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What became of a group.

    Attributes:
        rows: in the order of the jobs.
        matmul_gflops: rate of matrix products that took turns with the rows, by dtype.
    """

    rows: list[Row]
    matmul_gflops: dict[str, float]


def measure_group(jobs: list[Job], tools: GroupTools) -> GroupResult:
    """Try each row by itself, then time all of them in turns.

    A row that fails stays in the list with its reason; the others go on.
    """
    counted: dict[tuple[object, ...], tuple[Macs, int]] = {}
    entries = []
    for job in jobs:
        tools.on_step(f"{_label(job.row)}: by itself", 1)
        entries.append(_prepare(job, tools, counted))
    matmul_gflops = _time_in_turns(entries, tools)
    return GroupResult(
        rows=[_with_rates(entry.row, matmul_gflops) for entry in entries], matmul_gflops=matmul_gflops
    )


def _time_in_turns(entries: list[_Entry], tools: GroupTools) -> dict[str, float]:
    """Time what could be prepared, beside matrix products in the same dtypes; return the rates of these."""
    settings, device = tools.settings, torch.device(tools.settings.device)
    owners: dict[str, tuple[_Entry, str]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for i, entry in enumerate(entries):
        for kind, call in entry.calls().items():
            owners[f"{i} {kind}"] = entry, kind
            calls[f"{i} {kind}"] = call
    dtypes = dict.fromkeys(entry.row.dtype for entry, _ in owners.values())
    calls |= {dtype: matrix_product(settings.device, dtype) for dtype in dtypes}

    def note_call(name: str) -> None:
        if name in owners:
            tools.on_step(_label(owners[name][0].row), 1)

    def note_error(name: str, error: Exception) -> None:
        if name not in owners:
            raise error
        entry, kind = owners[name]
        entry.fail(error, "" if kind == _FORWARD else f"{kind}: ")

    seconds = collect_in_turns(
        {name: partial(_run, call, device) for name, call in calls.items()},
        repeats=settings.repeats,
        warmup=settings.warmup,
        budget_s=settings.budget_s,
        calls_per_turn=settings.calls_per_turn,
        clock=tools.clock,
        on_call=note_call,
        on_error=note_error,
    )
    for name, (entry, kind) in owners.items():
        if spent := seconds.get(name):
            entry.note_times(kind, spent)
    return {dtype: product_gflops(settings.device, seconds[dtype]) for dtype in dtypes}


def _run(call: Callable[[], object], device: torch.device) -> None:
    call()
    synchronize(device)


def _prepare(job: Job, tools: GroupTools, counted: dict[tuple[object, ...], tuple[Macs, int]]) -> _Entry:
    entry = _Entry(job.row)
    if reason := why_impossible(job.row):
        entry.row = replace(job.row, status="absent", error=reason)
        return entry
    try:
        key = (job.row.model, job.row.source, job.row.variant, job.row.height, job.row.width)
        if key not in counted:
            counted[key] = count_row_macs(job)
        macs, parameters = counted[key]
        entry.row = replace(job.row, parameters=parameters, macs=macs.total, macs_scan=macs.scan)
        onnx_file = tools.onnx_file_of(job) if job.row.mode == "onnx" else None
        if tools.server is not None:
            entry.row = _with_memory(
                entry.row, tools.server.measure(job, onnx_file, train=tools.settings.train)
            )
        # Out of memory there, or broken there: here it would take everything else with it.
        if entry.row.status == "ok" or entry.row.peak_memory_mib is not None:
            train = tools.settings.train and entry.row.status == "ok"
            entry.prepared = prepare(job, onnx_file, train=train)
            if tools.settings.device == "cuda":
                entry.row = _with_cuda_memory(entry.row, entry.prepared)
    except MemoryServerError:
        raise
    except Exception as error:
        entry.fail(error)
    return entry


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


def _with_cuda_memory(row: Row, prepared: Prepared) -> Row:
    """Read the allocator's peak over what was allocated before, whichever models lie beside this one."""
    forward = prepared.held_bytes + _cuda_rise(prepared.forward)
    train = None
    if prepared.train_step is not None:
        prepared.train_step()
        train = (prepared.train_step.held_bytes + _cuda_rise(prepared.train_step)) / 2**20
    return replace(row, peak_memory_mib=forward / 2**20, train_memory_mib=train)


def _cuda_rise(call: Callable[[], object]) -> int:
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


def _label(row: Row) -> str:
    name = f"{row.model} {row.variant}" if row.variant else row.model
    return f"{name}, {row.source}, {row.mode}, {row.dtype}, batch {row.batch}, {row.height}x{row.width}"
