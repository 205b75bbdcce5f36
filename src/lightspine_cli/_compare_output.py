"""What `compare` and `demo` print at their end."""

from typing import Any

from lightspine_cli._output import print_table, with_thousands


def print_comparison(result: Any) -> None:
    """Print the table of a `lightspine.compare.results.CompareResult`, what failed, and where things are."""
    print()
    print_table(
        (
            "model",
            ">parameters",
            ">MMACs",
            ">pixels",
            ">accuracy %",
            ">training s",
            ">latency ms",
            ">p90 ms",
            "checkpoint",
        ),
        [_row(row) for row in result.models],
        title=f"{result.data}: accuracy on held-out images; latency on {result.conditions}",
    )
    print()
    for row in result.models:
        if row.error:
            print(f"{row.name} {row.status}: {row.error}")
        if row.skipped:
            print(f"{row.name}: {len(row.skipped)} images could not be used, see results.json")
    files = [*result.files, *(str(row.checkpoint) for row in result.finished)]
    print(f"{result.folder} holds {', '.join(files)}; it took {result.seconds:.0f} s")


def _row(row: Any) -> tuple[str, ...]:
    return (
        row.name,
        with_thousands(row.params),
        _number(row.macs and row.macs / 1e6, 1),
        "-" if row.input_size is None else "x".join(map(str, row.input_size[1:])),
        _number(row.accuracy, 2),
        _number(row.train_seconds, 1),
        _number(row.latency_ms, 1),
        _number(row.latency_p90_ms, 1),
        row.checkpoint or row.status,
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
