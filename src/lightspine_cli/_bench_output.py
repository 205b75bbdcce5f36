"""How `lightspine bench` prints."""

from typing import Any

from lightspine_cli._output import print_pairs, print_table

_TIME_COLUMNS = (
    "shape",
    ">batch",
    ">floor ms",
    ">forward ms",
    ">/ floor",
    ">reference x",
    ">torch x",
    ">and backward ms",
    ">/ forward",
    ">torch x",
)
_TIME_FACTS = (
    ("floor", "PyTorch's softplus over (B, K D, L) and exp over (B, K D, L, N), into memory at hand"),
    ("reference x", "how many times slower the plain loop is (only in a batch of 1)"),
    ("torch x", "how many times slower the backend `torch` is: forward; then both (only in a batch of 1)"),
)
_MEMORY_COLUMNS = (
    "shape",
    ">batch",
    ">inputs MiB",
    ">outputs MiB",
    ">forward peak / outputs",
    ">backward peak / inputs",
)
_MEMORY_FACT = ("peak", "what a pass adds at its highest, its results included, in a process of its own")
# Above this, another process has had a processor for half of the last minute.
_BUSY = 0.5


def print_ops(report: Any) -> None:
    """Print a `lightspine.benchmark.ops.OpsReport`."""
    system, load = report.system, report.load_before
    busy = "" if load is None or load <= _BUSY else ": the machine was busy, the times below are blurred"
    print_pairs(
        [
            ("processor", f"{system['processor']}, threads: {report.threads}"),
            ("torch", f"{system['versions']['torch']}, {system['date']}"),
            ("load before", "unknown" if load is None else f"{load:.2f}{busy}"),
        ]
    )
    if timed := [_time_row(row) for row in report.rows if row.times]:
        print()
        print_table(_TIME_COLUMNS, timed, title=f"medians of up to {report.repeats} calls, in turns")
        print()
        print_pairs(_TIME_FACTS)
    if weighed := [_memory_row(row) for row in report.rows if row.memory is not None]:
        print()
        print_table(_MEMORY_COLUMNS, weighed)
        print()
        print_pairs([_MEMORY_FACT])
    if report.shares:
        print()
        print_table(
            ("model, batch 1, 224 pixels", ">forward ms", ">scans ms", ">share %"),
            [
                (name, f"{share.forward_ms:.1f}", f"{share.scan_ms:.1f}", f"{100 * share.share:.1f}")
                for name, share in report.shares.items()
            ],
        )
    if report.saved:
        print()
        print_table(
            ("kept for the backward", ">bytes per token", ">recomputing", "default"),
            [
                (entry.block, f"{entry.kept:,.0f}", f"{entry.recomputed:,.0f}", entry.by_default)
                for entry in report.saved
            ],
        )
    print()
    _print_checks(report.checks)


def _time_row(row: Any) -> tuple[str, ...]:
    from lightspine.benchmark.ops_time import (
        BLOCKED,
        BLOCKED_TRAINING,
        FLOOR,
        REFERENCE,
        SCAN,
        SCAN_TRAINING,
    )

    ms = {name: timing.median_ms for name, timing in row.times.items()}
    return (
        row.case.name,
        str(row.batch),
        f"{ms[FLOOR]:.2f}",
        f"{ms[SCAN]:.2f}",
        f"{ms[SCAN] / ms[FLOOR]:.2f}",
        f"{ms[REFERENCE] / ms[SCAN]:.1f}" if REFERENCE in ms else "-",
        f"{ms[BLOCKED] / ms[SCAN]:.1f}",
        f"{ms[SCAN_TRAINING]:.2f}",
        f"{ms[SCAN_TRAINING] / ms[SCAN]:.2f}",
        f"{ms[BLOCKED_TRAINING] / ms[SCAN_TRAINING]:.1f}" if BLOCKED_TRAINING in ms else "-",
    )


def _memory_row(row: Any) -> tuple[str, ...]:
    memory = row.memory
    return (
        row.case.name,
        str(row.batch),
        f"{memory.inputs / 2**20:.2f}",
        f"{memory.outputs / 2**20:.2f}",
        f"{memory.forward / memory.outputs:.3f}",
        f"{memory.backward / memory.inputs:.2f}",
    )


def _print_checks(checks: list[Any]) -> None:
    """Print one line per target: how many of its measurements meet it, and which do not."""
    targets = list(dict.fromkeys((check.what, check.rule, check.limit) for check in checks))
    rows = []
    for what, rule, limit in targets:
        same = [check for check in checks if (check.what, check.rule, check.limit) == (what, rule, limit)]
        missed = [f"{check.where} ({check.value:.2f})" for check in same if check.met is False]
        unsure = sum(check.met is None for check in same)
        met = f"{sum(check.met is True for check in same)} of {len(same) - unsure}"
        notes = [*missed, *([f"{unsure} too small to tell"] if unsure else [])]
        rows.append((what, f"{rule} {limit:g}", met, "; ".join(notes)))
    print_table(("target", "", ">met", "not met"), rows)
