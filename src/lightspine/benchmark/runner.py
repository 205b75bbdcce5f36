"""Run a model benchmark: measure all groups, save after each, resume an interrupted run."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightspine.benchmark.groups import GroupTools, measure_group
from lightspine.benchmark.memory import MemoryServer, memory_server
from lightspine.benchmark.model_specs import ModelSpec
from lightspine.benchmark.peak_rss import can_measure_memory
from lightspine.benchmark.prepare import temporary_onnx_files
from lightspine.benchmark.results import (
    EXPORTED_MODES,
    RESULTS_NAME,
    BenchResult,
    load_results,
    save_results,
)
from lightspine.benchmark.settings import BenchSettings, absent_rows, plan_groups
from lightspine.benchmark.system import describe_system
from lightspine.errors import UsageError
from lightspine.export.onnx_file import check_installed
from lightspine.export.onnx_network import check_runtime
from lightspine.utils.devices import check_device, torch_threads

# A run is resumed only on a system with the same values of these fields.
_RESUME_SYSTEM_FIELDS = ("platform", "processor", "processors_usable", "devices", "versions")


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Output folder of a run, and its command.

    Attributes:
        folder: for `results.json` and `results.csv`; `None` saves nothing.
        resume: continue the run in the folder.
        command: the command line that repeats the run.
        preset: name of the preset, if any.
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
    """Measure time and memory of models; `docs/benchmarks/method.md` describes the protocol.

    Args:
        specs: the models, including those that are not available.
        settings: settings of the benchmark.
        destination: output folder; by default nothing is saved.
        clock: returns seconds.
        on_plan: called once with the number of steps.
        on_step: called with the current row and the number of steps done.

    Returns:
        A row for each model, mode, dtype, batch size and image size, including those that failed.

    Raises:
        UsageError: there is no model, the device or a package is missing, or the folder has another run.
        LightspineError: the results cannot be written.
    """
    destination = destination or Destination()
    if not specs:
        raise UsageError("expected one or more models, got none")
    check_device(settings.device)
    if set(EXPORTED_MODES) & set(settings.modes):
        check_installed("onnx", "onnxscript", "onnxruntime")
    if "runtime" in settings.modes:
        check_runtime("mode runtime")
    result = _start_or_resume(destination, settings.as_dict() | {"models": [_full_name(s) for s in specs]})
    done = {row.key for row in result.rows}
    groups = [[job for job in group if job.row.key not in done] for group in plan_groups(specs, settings)]
    calls = settings.calls * (2 if settings.train else 1)
    on_plan(sum(len(group) * (1 + calls) for group in groups))
    with (
        torch_threads(settings.threads),
        _unlimited_recompilation(settings),
        _memory_server_if_possible(settings, any(groups)) as server,
        temporary_onnx_files() as onnx_file_of,
    ):
        tools = GroupTools(
            settings=settings, server=server, onnx_file_of=onnx_file_of, clock=clock, on_step=on_step
        )
        for group in filter(None, groups):
            measured = measure_group(group, tools)
            result.rows.extend(measured.rows)
            for dtype, rate in measured.matmul_gflops.items():
                # The highest rate is that of the least disturbed group.
                result.matmul_gflops[dtype] = max(rate, result.matmul_gflops.get(dtype, 0.0))
            _save(result, destination)
    result.rows.extend(row for row in absent_rows(specs, settings) if row.key not in done)
    _save(result, destination)
    return result


def _full_name(spec: ModelSpec) -> str:
    return "/".join(part for part in (spec.source, spec.name, spec.variant) if part)


def _save(result: BenchResult, destination: Destination) -> None:
    if destination.folder is not None:
        save_results(result, destination.folder)


def _memory_server_if_possible(
    settings: BenchSettings, has_rows: bool
) -> AbstractContextManager[MemoryServer | None]:
    if settings.device == "cpu" and has_rows and can_measure_memory():
        return memory_server()
    return nullcontext()


def _unlimited_recompilation(settings: BenchSettings) -> AbstractContextManager[object]:
    """Raise torch.compile's limit of eight models per class, beyond which it falls back to eager mode."""
    if "compile" not in settings.modes:
        return nullcontext()
    # Importing the compiler takes a second or two.
    from torch._dynamo import config

    limit = 10**6
    return config.patch(recompile_limit=limit, accumulated_recompile_limit=limit)


def _start_or_resume(destination: Destination, settings: dict[str, Any]) -> BenchResult:
    """Return the saved result of an interrupted run, or an empty one."""
    fresh = BenchResult(
        command=list(destination.command),
        preset=destination.preset,
        settings=settings,
        system=describe_system(),
        matmul_gflops={},
    )
    folder = destination.folder
    if folder is None:
        if destination.resume:
            raise UsageError("expected --out with the folder of the run to resume")
        return fresh
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected a folder for the results, got the file {folder}")
    if not (folder / RESULTS_NAME).exists():
        return fresh
    if not destination.resume:
        raise UsageError(f"{folder} already holds a result: use --resume to continue it, or another --out")
    saved = load_results(folder)
    names = tuple(dict.fromkeys(("preset", *saved.settings, *settings)))
    _check_equal(
        {"preset": saved.preset} | saved.settings,
        {"preset": destination.preset} | settings,
        folder,
        names,
    )
    _check_equal(saved.system, fresh.system, folder, _RESUME_SYSTEM_FIELDS)
    return saved


def _check_equal(
    saved: dict[str, Any], current: dict[str, Any], folder: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        if saved.get(name) != current.get(name):
            raise UsageError(
                f"cannot resume the run in {folder}: its {name} is {_shorten(saved.get(name))}, "
                f"this run has {_shorten(current.get(name))}"
            )


def _shorten(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
