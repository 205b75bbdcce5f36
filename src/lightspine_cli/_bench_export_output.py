"""How `lightspine bench export` prints."""

from typing import Any

from lightspine_cli._output import print_facts, print_table

_COLUMNS = ("model", ">batch", ">eager ms", ">optimised ms", ">ONNX ms", ">timm ONNX ms", ">file / weights")


def print_export(report: Any) -> None:
    """Print a `lightspine.benchmark.export_speed.ExportReport`."""
    from lightspine.benchmark.export_speed import EAGER, ONNX, OPTIMIZED, TIMM

    system = report.system
    print_facts(
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
        ("target", "", ">met", "not met"),
        [_summary(report.checks, target) for target in dict.fromkeys(map(_target, report.checks))],
    )


def _target(check: Any) -> tuple[str, str, float]:
    return check.what, check.rule, check.limit


def _summary(checks: list[Any], target: tuple[str, str, float]) -> tuple[str, str, str, str]:
    same = [check for check in checks if _target(check) == target]
    missed = [f"{check.where} ({check.value:.2f})" for check in same if not check.met]
    return (
        target[0],
        f"{target[1]} {target[2]:g}",
        f"{len(same) - len(missed)} of {len(same)}",
        "; ".join(missed),
    )
