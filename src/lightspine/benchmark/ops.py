"""The scans measured against their targets: time, memory, their share of whole models."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn as nn

import lightspine
from lightspine.benchmark.ops_cases import ScanCase
from lightspine.benchmark.ops_memory import ScanMemory, measure_scan_memory
from lightspine.benchmark.ops_targets import Check, check_row, check_share
from lightspine.benchmark.ops_time import time_scan
from lightspine.benchmark.resident import can_measure_memory
from lightspine.benchmark.saved import count_saved_bytes
from lightspine.benchmark.scan_share import ScanShare, measure_scan_share
from lightspine.benchmark.system import describe_system
from lightspine.benchmark.turns import Timing
from lightspine.blocks import VimBlock, VSSBlock
from lightspine.errors import UsageError
from lightspine.utils.devices import torch_threads

PARTS = ("time", "memory", "models")
SHARE_MODELS = ("vmamba_tiny", "vim_tiny")
_SIDE = 14


@dataclass(kw_only=True)
class OpsRow:
    """What was measured of one shape in one batch.

    Attributes:
        case: the shape.
        batch: images or sequences.
        times: see `time_scan`; empty where time was not measured.
        memory: `None` where it was not measured.
    """

    case: ScanCase
    batch: int
    times: dict[str, Timing] = field(default_factory=dict)
    memory: ScanMemory | None = None


@dataclass(frozen=True, kw_only=True)
class SavedBytes:
    """What each block of a model keeps in training per token, with what its scan reads kept or recomputed.

    Attributes:
        block: the block and its width, in float32.
        kept: bytes per token with `recompute=False`.
        recomputed: bytes per token with `recompute=True`.
        by_default: which of the two the library does unless told otherwise, "kept" or "recomputed".
    """

    block: str
    kept: float
    recomputed: float
    by_default: str


@dataclass(frozen=True, kw_only=True)
class OpsReport:
    """The result of `measure_ops`.

    Attributes:
        system: see `describe_system`.
        threads: torch threads.
        repeats: timed calls of each function, unless it is very slow.
        load_before: processes that wanted a processor during the minute before; `None` where it is unknown.
        rows: one per shape and batch.
        shares: share of the scans in a model's forward pass at batch 1 and 224 pixels, by name of the model.
        saved: memory kept in training.
        checks: every target that could be judged.
    """

    system: dict[str, Any]
    threads: int
    repeats: int
    load_before: float | None
    rows: list[OpsRow]
    shares: dict[str, ScanShare]
    saved: list[SavedBytes]
    checks: list[Check]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        return asdict(self)


def measure_ops(
    cases: Sequence[ScanCase],
    batches: Sequence[int],
    *,
    threads: int | None = None,
    repeats: int = 15,
    parts: Sequence[str] = PARTS,
    on_step: Callable[[str], None] = lambda _: None,
) -> OpsReport:
    """Measure the scans on the CPU and hold the results against the targets.

    Args:
        cases: the shapes.
        batches: images or sequences at a time.
        threads: number of torch threads during the measurement; unchanged by default.
        repeats: timed calls of each function, and at most ten profiled passes of each model.
        parts: what to measure, out of `PARTS`: "time" and "memory" of the scans (memory on Linux only), and
            the "models": the share of the scans in them and what their blocks keep in training.
        on_step: called with a short text after each of `count_steps` steps.

    Raises:
        UsageError: an unknown part, or a batch, `repeats` or `threads` that is not positive.
        LightspineError: the process that measures memory failed.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"expected parts out of {', '.join(PARTS)}, got {', '.join(unknown)}")
    numbers = [*batches, repeats, *([] if threads is None else [threads])]
    if min(numbers) < 1:
        raise UsageError(f"batches, repeats and threads must be at least 1, got {min(numbers)}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = {(case.name, batch): OpsRow(case=case, batch=batch) for batch in batches for case in cases}
    shares: dict[str, ScanShare] = {}
    saved: list[SavedBytes] = []
    with torch_threads(threads):
        system = describe_system()
        # Before anything has filled the caches of this process.
        if "models" in parts:
            saved = list(_saved_bytes())
            for name in SHARE_MODELS:
                shares[name] = measure_scan_share(
                    lightspine.create_model(name), torch.randn(1, 3, 224, 224), repeats=min(repeats, 10)
                )
                on_step(name)
        if "memory" in parts and can_measure_memory():
            jobs = [(row.case, row.batch) for row in rows.values()]
            for case, batch, memory in measure_scan_memory(jobs, torch.get_num_threads()):
                rows[case.name, batch].memory = memory
                on_step(f"memory of {case.name}, batch {batch}")
        if "time" in parts:
            for row in rows.values():
                row.times = time_scan(row.case, row.batch, repeats)
                on_step(f"time of {row.case.name}, batch {row.batch}")
        used = torch.get_num_threads()
    checks = [
        check for row in rows.values() for check in check_row(row.case, row.batch, row.times, row.memory)
    ]
    checks += [check_share(name, share) for name, share in shares.items()]
    return OpsReport(
        system=system,
        threads=used,
        repeats=repeats,
        load_before=load,
        rows=list(rows.values()),
        shares=shares,
        saved=saved,
        checks=checks,
    )


def count_steps(cases: Sequence[ScanCase], batches: Sequence[int], parts: Sequence[str]) -> int:
    """Return how often `measure_ops` calls `on_step`."""
    scans = len(cases) * len(batches)
    memory = scans if "memory" in parts and can_measure_memory() else 0
    return memory + scans * ("time" in parts) + len(SHARE_MODELS) * ("models" in parts)


def _saved_bytes() -> Iterator[SavedBytes]:
    blocks: list[tuple[str, int, Callable[[bool], nn.Module], str]] = [
        ("VimBlock(192), Vim-Ti", 192, lambda switch: VimBlock(192, recompute=switch), "recomputed"),
        ("VimBlock(384), Vim-S", 384, lambda switch: VimBlock(384, recompute=switch), "recomputed"),
        ("VSSBlock(96), VMamba-T", 96, lambda switch: VSSBlock(96, ssm_recompute=switch), "kept"),
    ]
    for name, dim, build, by_default in blocks:
        kept, recomputed = (_kept_per_token(build, switch, dim) for switch in (False, True))
        yield SavedBytes(block=name, kept=kept, recomputed=recomputed, by_default=by_default)


def _kept_per_token(build: Callable[[bool], nn.Module], switch: bool, dim: int) -> float:
    images = torch.randn(1, dim, _SIDE, _SIDE)
    one, two = (nn.Sequential(*(build(switch) for _ in range(depth))) for depth in (1, 2))
    # What the second block adds: the stream between the two is kept as well.
    return (count_saved_bytes(two, images) - count_saved_bytes(one, images)) / _SIDE**2
