"""How a benchmark of models is to be run, and the rows that follow from it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from lightspine.benchmark.models.specs import ModelSpec, own_size
from lightspine.benchmark.results import Mode, Row
from lightspine.errors import UsageError

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How models are measured.

    Attributes:
        batches: images at a time.
        sizes: (height, width) in pixels; `None` for the size that each model is evaluated at by its authors.
        modes: "eager", "optimized", "compile", "onnx".
        dtypes: "float32", "bfloat16", "float16".
        device: "cpu" or "cuda".
        threads: of torch and of ONNX Runtime.
        train: measure a training step too, in the modes that can train.
        repeats: timed calls of each row.
        warmup: untimed calls of each row before all turns.
        calls_per_turn: timed calls of each turn, behind an untimed one.
        budget_s: a row that has spent so many seconds in at least three timed calls sits the rest out.
    """

    batches: tuple[int, ...] = (1,)
    sizes: tuple[tuple[int, int] | None, ...] = (None,)
    modes: tuple[Mode, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    threads: int = 2
    train: bool = False
    repeats: int = 15
    warmup: int = 2
    calls_per_turn: int = 3
    budget_s: float = 10.0

    @property
    def calls(self) -> int:
        """Calls of a row that stays within its budget, untimed ones included."""
        return self.warmup + self.repeats + math.ceil(self.repeats / self.calls_per_turn)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        _check_choices("modes", self.modes, get_args(Mode))
        _check_choices("dtypes", self.dtypes, DTYPES)
        _check_choices("devices", (self.device,), DEVICES)
        for name in ("batches", "sizes"):
            if not getattr(self, name):
                raise UsageError(f"expected one or more {name} to measure at, got none")
        counts = (*self.batches, self.threads, self.repeats, self.warmup, self.calls_per_turn)
        if min(counts) < 1 or self.budget_s <= 0:
            raise UsageError(
                "batches, threads, repeats, warm-up calls, calls per turn and the budget must be at least 1, "
                f"got {list(self.batches)}, {self.threads}, {self.repeats}, {self.warmup}, "
                f"{self.calls_per_turn} and {self.budget_s}"
            )
        if small := [size for size in self.sizes if size is not None and min(size) < 32]:
            raise UsageError(
                f"a model takes images of at least 32 x 32 pixels, got {small[0][0]} x {small[0][1]}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as they come back from JSON."""
        values = asdict(self)
        return {name: _plain(value) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row to measure.

    Attributes:
        spec: the model.
        row: what is known of the row before it is measured.
    """

    spec: ModelSpec
    row: Row


def plan_groups(specs: Sequence[ModelSpec], settings: BenchSettings) -> list[list[Job]]:
    """Return the rows to measure, in groups that take turns.

    A group holds what is compared: every model, mode and dtype at one batch and size. It is also what is
    saved at a time, and what an interrupted run goes on after.
    """
    here = [spec for spec in specs if spec.absent is None]
    return [list(_jobs(here, settings, batch, size)) for batch in settings.batches for size in settings.sizes]


def absent_rows(specs: Sequence[ModelSpec], settings: BenchSettings) -> list[Row]:
    """Return a row for each model of a table that nobody can measure here, with its published figures."""
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


def _jobs(
    specs: Sequence[ModelSpec], settings: BenchSettings, batch: int, size: tuple[int, int] | None
) -> Iterator[Job]:
    for spec in specs:
        height, width = size or own_size(spec)
        # Accuracies and multiply-adds are printed for one size.
        published = spec.published if (height, width) == own_size(spec) else None
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
        raise UsageError(f"expected {what} out of {', '.join(known)}, got {', '.join(unknown) or 'none'}")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
