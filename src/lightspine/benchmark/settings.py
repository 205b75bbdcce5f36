"""Settings of a model benchmark, and the rows that it measures."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from lightspine.benchmark.model_specs import ModelSpec, check_image_size, evaluation_size
from lightspine.benchmark.noise import default_threads
from lightspine.benchmark.results import Mode, Row
from lightspine.errors import UsageError

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a model benchmark.

    Attributes:
        batches: batch sizes.
        sizes: (height, width) in pixels; `None` for the size at which the authors evaluate each model.
        modes: any of "eager", "optimized", "compile", "onnx", "runtime".
        dtypes: any of "float32", "bfloat16", "float16".
        device: "cpu" or "cuda".
        threads: threads of torch and of ONNX Runtime; by default `OMP_NUM_THREADS`, or 2.
        train: also measure a training step, in the modes eager and compile.
        repeats: timed calls of each row.
        warmup: untimed calls of each row at the start.
        calls_per_turn: timed calls of a row in each round, after one untimed call.
        budget_s: stop timing a row after this many seconds in three or more timed calls.

    Raises:
        UsageError: a choice is unknown, or a number is too small.
    """

    batches: tuple[int, ...] = (1,)
    sizes: tuple[tuple[int, int] | None, ...] = (None,)
    modes: tuple[Mode, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    threads: int = field(default_factory=default_threads)
    train: bool = False
    repeats: int = 15
    warmup: int = 2
    calls_per_turn: int = 3
    budget_s: float = 10.0

    @property
    def calls(self) -> int:
        """Calls of a row within its budget, including untimed ones."""
        return self.warmup + self.repeats + math.ceil(self.repeats / self.calls_per_turn)

    def __post_init__(self) -> None:
        """Check the values."""
        _check_choices("modes", self.modes, get_args(Mode))
        _check_choices("dtypes", self.dtypes, DTYPES)
        _check_choices("devices", (self.device,), DEVICES)
        for name in ("batches", "sizes"):
            if not getattr(self, name):
                raise UsageError(f"expected one or more {name}, got none")
        counts = (*self.batches, self.threads, self.repeats, self.warmup, self.calls_per_turn)
        if min(counts) < 1 or self.budget_s <= 0:
            raise UsageError(
                "batches, threads, repeats, warmup, calls_per_turn and budget_s must be at least 1, "
                f"got {list(self.batches)}, {self.threads}, {self.repeats}, {self.warmup}, "
                f"{self.calls_per_turn} and {self.budget_s}"
            )
        for size in self.sizes:
            if size is not None:
                check_image_size(*size)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that survive a JSON round trip unchanged."""
        return {name: _tuples_to_lists(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row to measure.

    Attributes:
        spec: the model.
        row: the row with its conditions, before it is measured.
    """

    spec: ModelSpec
    row: Row


def plan_groups(specs: Sequence[ModelSpec], settings: BenchSettings) -> list[list[Job]]:
    """Return the rows to measure in groups: all models, modes and dtypes at one batch and image size.

    The rows of a group are timed interleaved. Results are saved after each group. On CUDA each model is a
    group: all of them might not fit into the memory, and the device is not shared.
    """
    available = [spec for spec in specs if spec.absent is None]
    together = [[spec] for spec in available] if settings.device == "cuda" else [available]
    return [
        list(_plan_group(group, settings, batch, size))
        for batch in settings.batches
        for size in settings.sizes
        for group in together
    ]


def absent_rows(specs: Sequence[ModelSpec], settings: BenchSettings) -> list[Row]:
    """Return a row for each model that cannot be measured, with the reason and the published figures."""
    return [
        Row(
            model=spec.name,
            source=spec.source,
            variant=spec.variant,
            note=spec.note,
            mode="eager",
            device=settings.device,
            dtype="float32",
            threads=settings.threads,
            batch=0,
            height=0,
            width=0,
            status="absent",
            error=spec.absent,
            published=spec.published,
        )
        for spec in specs
        if spec.absent is not None
    ]


def _plan_group(
    specs: Sequence[ModelSpec], settings: BenchSettings, batch: int, size: tuple[int, int] | None
) -> Iterator[Job]:
    for spec in specs:
        height, width = size or evaluation_size(spec)
        # Published figures hold for the evaluation size only.
        published = spec.published if (height, width) == evaluation_size(spec) else None
        for mode in settings.modes:
            for dtype in settings.dtypes:
                row = Row(
                    model=spec.name,
                    source=spec.source,
                    variant=spec.variant,
                    note=spec.note,
                    mode=mode,
                    device=settings.device,
                    dtype=dtype,
                    threads=settings.threads,
                    batch=batch,
                    height=height,
                    width=width,
                    status="ok",
                    published=published,
                )
                yield Job(spec=spec, row=row)


def _check_choices(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in given if value not in known]
    if unknown or not given:
        raise UsageError(f"expected {what} from {', '.join(known)}, got {', '.join(unknown) or 'none'}")


def _tuples_to_lists(value: Any) -> Any:
    return [_tuples_to_lists(item) for item in value] if isinstance(value, tuple) else value
