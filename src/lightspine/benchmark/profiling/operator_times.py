"""How long each operator of PyTorch takes in a run, by PyTorch's own profiler."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from lightspine.benchmark.scan_share import quiet_profiler
from lightspine.utils.files import atomic_write

_MARK = "lightspine.run"
_OURS = "lightspine::"


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """One operator, in milliseconds of one run.

    Attributes:
        name: such as "aten::addmm".
        own_ms: without the operators that it called; on an accelerator, of its kernels.
        calls: in one run.
    """

    name: str
    own_ms: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class OperatorTimes:
    """What the profiler saw.

    Attributes:
        operators: the slowest first.
        run_ms: of one run, under the profiler, which makes it slower.
        scan_ms: of the selective scans in it, with all that they call.
    """

    operators: list[OperatorTime]
    run_ms: float
    scan_ms: float

    @property
    def scan_share(self) -> float:
        """The scans' share of the run, 0 to 1."""
        return self.scan_ms / self.run_ms


def measure_operators(
    run: Callable[[], object], *, repeats: int, device: str, trace: Path | None = None
) -> OperatorTimes:
    """Profile some runs.

    Args:
        run: runs the model once and waits until it is done.
        repeats: profiled runs, whose mean is told.
        device: "cpu" or "cuda".
        trace: file for Chrome's trace viewer, or Perfetto.

    Raises:
        LightspineError: the trace cannot be written.
    """
    on_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with quiet_profiler(), profile(activities=activities) as profiler:
        for _ in range(repeats):
            with record_function(_MARK):
                run()
    if trace is not None:
        # The profiler writes a file of that name itself, piece by piece.
        with atomic_write(trace) as file:
            profiler.export_chrome_trace(file.name)
    events: list[Any] = [event for event in profiler.key_averages() if event.key != _MARK]
    [mark] = [event for event in profiler.key_averages() if event.key == _MARK]
    per_run_ms = 1 / (1000 * repeats)
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    whole = "device_time_total" if on_cuda else "cpu_time_total"
    operators = [
        OperatorTime(
            name=event.key, own_ms=getattr(event, own) * per_run_ms, calls=round(event.count / repeats)
        )
        for event in events
    ]
    return OperatorTimes(
        operators=sorted(operators, key=lambda operator: -operator.own_ms),
        run_ms=mark.cpu_time_total * per_run_ms,
        scan_ms=sum(getattr(event, whole) for event in profiler.events() if _is_scan(event)) * per_run_ms,
    )


def _is_scan(event: Any) -> bool:
    """Tell the scans, but for those that are part of another one."""
    parent = event.cpu_parent
    while parent is not None and not parent.key.startswith(_OURS):
        parent = parent.cpu_parent
    return event.key.startswith(_OURS) and parent is None
