"""Tables of `lightspine compare` and `lightspine demo`."""

from typing import Any

from lightspine_cli._output import print_table, print_text, with_thousands


def print_comparison(result: Any) -> None:
    """Print the table, the failures and the files of a `lightspine.compare.results.CompareResult`."""
    print_text()
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
        [_model_row(row) for row in result.models],
        title=f"{result.data}: accuracy on held-out images; latency on {result.conditions}",
    )
    print_text()
    for row in result.models:
        if row.error:
            print_text(f"{row.name} {row.status}: {row.error}")
        if row.skipped:
            print_text(f"{row.name}: {len(row.skipped)} images could not be read, see results.json")
    files = [*result.files, *(str(row.checkpoint) for row in result.finished)]
    print_text(f"{result.folder} contains {', '.join(files)} (took {result.seconds:.0f} s)")


def _model_row(row: Any) -> tuple[str, ...]:
    return (
        row.name,
        with_thousands(row.params),
        _format_number(row.macs and row.macs / 1e6, 1),
        "-" if row.input_size is None else "x".join(map(str, row.input_size[1:])),
        _format_number(row.accuracy, 2),
        _format_number(row.train_seconds, 1),
        _format_number(row.latency_ms, 1),
        _format_number(row.latency_p90_ms, 1),
        row.checkpoint or row.status,
    )


def _format_number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
