"""How `lightspine bench export` prints."""

from typing import Any

from lightspine_cli._output import print_pairs, print_table

_COLUMNS = ("model", ">batch", ">eager ms", ">optimised ms", ">ONNX ms", ">timm ONNX ms", ">file / weights")


def print_export(report: Any) -> None:
    """Print a `lightspine.benchmark.export_speed.ExportReport`."""
    from lightspine.benchmark.export_speed import EAGER, ONNX, OPTIMIZED, TIMM

    system = report.system
    print_pairs(
        [
            ("processor", f"{system['processor']}, threads: {report.threads}"),
            (
                "versions",
                f"torch {system['versions']['torch']}, ONNX Runtime {system['versions']['onnxruntime']}",
            ),
            ("date", system["date"]),
        ]
    )
    print()
    rows = []
    for row in report.rows:
        ms = [row.times.get(what) for what in (EAGER, OPTIMIZED, ONNX, TIMM)]
        shown = ["-" if timing is None else f"{timing.median_ms:.1f}" for timing in ms]
        rows.append((row.model, str(row.batch), *shown, f"{row.bytes / row.weight_bytes:.3f}"))
    print_table(_COLUMNS, rows, title="medians of calls in turns, 224 pixels")
    print()
    print_table(
        ("model", "quotient", ">measured", ">target", ""),
        [
            (
                check.where,
                check.what,
                f"{check.value:.3f}",
                f"{check.rule} {check.limit:g}",
                "met" if check.met else "missed",
            )
            for check in report.checks
        ],
    )
    print()
    print(f"{sum(check.met for check in report.checks)} of {len(report.checks)} targets met")
