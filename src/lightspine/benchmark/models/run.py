"""`bench_models`: measure every row of a table in turns, group by group, saving after each."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lightspine.benchmark.models.group import GroupTools, measure_group
from lightspine.benchmark.models.memory import MemoryServer, memory_server
from lightspine.benchmark.models.prepare import onnx_files
from lightspine.benchmark.models.resume import start_or_resume
from lightspine.benchmark.models.settings import BenchSettings, Job, absent_rows, plan_groups
from lightspine.benchmark.models.specs import ModelSpec
from lightspine.benchmark.resident import can_measure_memory
from lightspine.benchmark.results import BenchResult, save_results
from lightspine.errors import UsageError
from lightspine.export.onnx_file import check_installed
from lightspine.utils.devices import torch_threads


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a run is saved.

    Attributes:
        folder: gets `results.json` and `results.csv` after each group; `None` to save nothing.
        resume: go on with what the folder holds.
        command: the arguments that repeat the run.
        preset: its name, if any.
    """

    folder: Path | None = None
    resume: bool = False
    command: tuple[str, ...] = ()
    preset: str | None = None


def bench_models(
    specs: Sequence[ModelSpec],
    settings: BenchSettings,
    destination: Destination | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_plan: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str, int], None] = lambda _text, _steps: None,
) -> BenchResult:
    """Measure models side by side: `docs/benchmarks/method.md` says how, and why so.

    Args:
        specs: the models, also those that are absent.
        settings: how to measure.
        destination: where to save; nowhere by default.
        clock: returns seconds.
        on_plan: called once with the number of steps of what is left to do.
        on_step: called with what is going on and how many steps are done with it.

    Returns:
        A row for each model, mode, dtype, batch and size, those that failed too.

    Raises:
        UsageError: no model, the device or packages are missing, or the folder holds another run.
        LightspineError: the result cannot be written.
    """
    destination = destination or Destination()
    _check(specs, settings)
    result = start_or_resume(
        destination.folder,
        resume=destination.resume,
        command=list(destination.command),
        preset=destination.preset,
        settings=settings.as_dict() | {"models": [_name_of(spec) for spec in specs]},
    )
    done = {row.key for row in result.rows}
    groups = [_left(group, done) for group in plan_groups(specs, settings)]
    calls = settings.calls * (2 if settings.train else 1)
    on_plan(sum(len(group) * (1 + calls) for group in groups))
    with (
        torch_threads(settings.threads),
        _no_limit_of_compilations(settings),
        _memory_server(settings, any(groups)) as server,
        onnx_files() as onnx_file_of,
    ):
        tools = GroupTools(
            settings=settings,
            server=server,
            onnx_file_of=onnx_file_of,
            clock=clock,
            on_step=on_step,
            calls=calls,
        )
        for group in groups:
            if group:
                measured = measure_group(group, tools)
                result.rows.extend(measured.rows)
                for dtype, rate in measured.matmul_gflops.items():
                    # Of several groups the least disturbed one.
                    result.matmul_gflops[dtype] = max(rate, result.matmul_gflops.get(dtype, 0.0))
                _save(result, destination)
    result.rows.extend(row for row in absent_rows(specs, settings) if row.key not in done)
    _save(result, destination)
    return result


def _check(specs: Sequence[ModelSpec], settings: BenchSettings) -> None:
    if not specs:
        raise UsageError("expected one or more models to measure, got none")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("expected a CUDA device for --device cuda, but PyTorch finds none here")
    if "onnx" in settings.modes:
        check_installed("onnx", "onnxscript", "onnxruntime")


def _name_of(spec: ModelSpec) -> str:
    return "/".join(part for part in (spec.source, spec.name, spec.variant) if part)


def _left(group: list[Job], done: set[tuple[object, ...]]) -> list[Job]:
    return [job for job in group if job.row.key not in done]


def _memory_server(settings: BenchSettings, anything: bool) -> AbstractContextManager[MemoryServer | None]:
    if settings.device == "cpu" and anything and can_measure_memory():
        return memory_server()
    return nullcontext()


def _no_limit_of_compilations(settings: BenchSettings) -> AbstractContextManager[object]:
    """Let every row be compiled: after eight networks of a class the compiler would run the rest eagerly."""
    if "compile" not in settings.modes:
        return nullcontext()
    # Loads the compiler, which takes a second or two.
    from torch._dynamo import config

    many = 10**6
    return config.patch(recompile_limit=many, accumulated_recompile_limit=many)


def _save(result: BenchResult, destination: Destination) -> None:
    if destination.folder is not None:
        save_results(result, destination.folder)
