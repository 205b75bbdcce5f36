"""`profile_model`: one model under hooks and under PyTorch's profiler."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from lightspine.benchmark.models.prepare import Prepared, prepare
from lightspine.benchmark.models.settings import BenchSettings, plan_groups
from lightspine.benchmark.models.specs import ModelSpec
from lightspine.benchmark.profiling.module_times import ModuleTime, measure_modules
from lightspine.benchmark.profiling.operator_times import OperatorTimes, measure_operators
from lightspine.benchmark.system import describe_system
from lightspine.errors import UsageError
from lightspine.utils.devices import synchronize, torch_threads
from lightspine.utils.files import atomic_write_text

PROFILE_NAME, TRACE_NAME = "profile.json", "trace.json"
ProfileMode = Literal["eager", "optimized"]


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What is profiled.

    Attributes:
        batch: images at a time.
        size: (height, width) in pixels; `None` for the size that the authors evaluate at.
        mode: "eager" or "optimized"; the other modes of `lightspine bench` have no modules to watch.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        threads: of torch.
        train: profile a training step; the times of modules are still those of its forward pass.
        repeats: runs of each kind, after two that do not count.
    """

    batch: int = 1
    size: tuple[int, int] | None = None
    mode: ProfileMode = "eager"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    train: bool = False
    repeats: int = 5


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """Where the time of a model goes.

    Attributes:
        model: its name.
        source: whose implementation.
        settings: what was profiled, with the height and width of the images.
        system: see `lightspine.benchmark.describe_system`.
        run_ms: median of one run without hooks and profiler.
        modules: the slowest first.
        operators: the slowest first, and the scans' share.
    """

    model: str
    source: str
    settings: dict[str, Any]
    system: dict[str, Any]
    run_ms: float
    modules: list[ModuleTime]
    operators: OperatorTimes

    @property
    def kinds(self) -> dict[str, float]:
        """Own milliseconds of all modules of a class, the slowest class first."""
        kinds: dict[str, float] = defaultdict(float)
        for module in self.modules:
            kinds[module.kind] += module.own_ms
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return asdict(self) | {"kinds_own_ms": self.kinds, "scan_share": self.operators.scan_share}


def profile_model(
    spec: ModelSpec,
    settings: ProfileSettings,
    folder: Path | None = None,
    *,
    on_step: Callable[[str], None] = lambda _: None,
) -> ModelProfile:
    """Run a model plain, then under hooks, then under PyTorch's profiler.

    Args:
        spec: the model.
        settings: what to profile.
        folder: gets `profile.json` and `trace.json`, which Chrome's trace viewer and Perfetto open.
        on_step: called with what is going on.

    Raises:
        UsageError: settings that do not exist, or no such device.
        LightspineError: the files cannot be written.
        Exception: whatever the model raises.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("expected a CUDA device for --device cuda, but PyTorch finds none here")
    if settings.train and settings.mode != "eager":
        raise UsageError(f"a training step has the mode eager, got {settings.mode}")
    [[job]] = plan_groups([spec], _as_bench(settings))
    device = torch.device(settings.device)
    with torch_threads(settings.threads):
        on_step("building")
        prepared = prepare(job, None, train=settings.train)
        model, call = _chosen(prepared)

        def run() -> None:
            call()
            synchronize(device)

        on_step("plain")
        for _ in range(2):
            run()
        run_ms = 1000 * statistics.median(_duration(run) for _ in range(settings.repeats))
        on_step("modules")
        modules = measure_modules(model, run, repeats=settings.repeats, wait=lambda: synchronize(device))
        on_step("operators")
        operators = measure_operators(
            run,
            repeats=settings.repeats,
            device=settings.device,
            trace=None if folder is None else folder / TRACE_NAME,
        )
        system = describe_system()
    profile = ModelProfile(
        model=spec.name,
        source=spec.source,
        settings=asdict(settings) | {"size": [job.row.height, job.row.width]},
        system=system,
        run_ms=run_ms,
        modules=modules,
        operators=operators,
    )
    if folder is not None:
        atomic_write_text(folder / PROFILE_NAME, json.dumps(profile.as_dict(), indent=1) + "\n")
    return profile


def _as_bench(settings: ProfileSettings) -> BenchSettings:
    return BenchSettings(
        batches=(settings.batch,),
        sizes=(settings.size,),
        modes=(settings.mode,),
        dtypes=(settings.dtype,),
        device=settings.device,
        threads=settings.threads,
        repeats=settings.repeats,
    )


def _chosen(prepared: Prepared) -> tuple[nn.Module, Callable[[], object]]:
    if prepared.train_step is not None:
        return prepared.train_step.model, prepared.train_step
    assert prepared.model is not None
    return prepared.model, prepared.forward


def _duration(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
