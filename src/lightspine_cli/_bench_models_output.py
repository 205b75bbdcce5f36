"""How `lightspine bench MODELS` prints."""

from typing import Any

from lightspine_cli._output import print_pairs, print_table, with_thousands

_COLUMNS = (
    "model",
    "of",
    "mode",
    "dtype",
    ">batch",
    ">size",
    ">median ms",
    ">p90 ms",
    ">images/s",
    ">MiB",
    ">params",
    ">MMACs",
    ">scan %",
    ">GFLOP/s",
    ">of matmul %",
    ">published top-1",
    ">published images/s",
)
_TRAIN_COLUMNS = (">train ms", ">train MiB")
_STATUS = {"out_of_memory": "out of memory", "failed": "failed", "absent": "absent"}


def print_result(result: Any) -> None:
    """Print a `lightspine.benchmark.results.BenchResult`."""
    system = result.system
    rates = ", ".join(f"{rate:.0f} in {dtype}" for dtype, rate in result.matmul_gflops.items())
    threads = result.settings["threads"]
    print_pairs(
        [
            ("processor", f"{system['processor']}, threads: {threads}"),
            ("torch, timm", f"{system['versions']['torch']}, {system['versions']['timm']}, {system['date']}"),
            ("matrix products", f"{rates} GFLOP/s"),
        ]
    )
    print()
    training = any(row.train_step is not None or row.train_memory_mib is not None for row in result.rows)
    columns = (*_COLUMNS, *_TRAIN_COLUMNS) if training else _COLUMNS
    shown = [row for row in result.rows if row.status == "ok" or row.forward is not None]
    print_table(columns, [_cells(row)[: len(columns)] for row in shown])
    others = [row for row in result.rows if row.status != "ok"]
    if others:
        print()
        print_table(
            ("not measured", "of", "mode", "dtype", ">batch", ">size", "", "why"),
            [(*_where(row), _STATUS[row.status], row.error or "") for row in others],
        )


def print_presets(presets: list[Any]) -> None:
    """Print the names of `lightspine.benchmark.presets.Preset`s."""
    print_table(
        ("preset", ">models", ">absent", "what"),
        [
            (
                preset.name,
                str(sum(spec.absent is None for spec in preset.specs)),
                str(sum(spec.absent is not None for spec in preset.specs)),
                preset.title,
            )
            for preset in presets
        ],
    )


def _where(row: Any) -> tuple[str, ...]:
    name = f"{row.model} ({row.variant})" if row.variant else row.model
    size = f"{row.height}x{row.width}" if row.height else "-"
    return (name, row.source, row.mode, row.dtype, str(row.batch) if row.batch else "-", size)


def _cells(row: Any) -> tuple[str, ...]:
    published = row.published
    return (
        *_where(row),
        *([_number(row.forward.median_ms, 1), _number(row.forward.p90_ms, 1)] if row.forward else ["-", "-"]),
        _number(row.forward and row.forward.images_per_s, 1),
        _number(row.peak_memory_mib, 0),
        with_thousands(row.parameters),
        _number(None if row.macs is None else row.macs / 1e6, 0),
        _number(100 * row.macs_scan / row.macs if row.macs else None, 1),
        _number(row.gflops_per_s, 1),
        _number(None if row.matmul_share is None else 100 * row.matmul_share, 0),
        _number(published and published.top1, 1),
        _number(published and published.throughput, 0),
        _number(row.train_step and row.train_step.median_ms, 1),
        _number(row.train_memory_mib, 0),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
