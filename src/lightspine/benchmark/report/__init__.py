"""Report of `lightspine bench` results: one self-contained HTML page, and each chart as PNG and SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from lightspine.benchmark.report.page import count_rows, make_run_part, render_page
from lightspine.benchmark.results import BenchResult, load_results
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_write, atomic_write_text
from lightspine.utils.progress import progress_bar

__all__ = ["Report", "write_report"]

PAGE_NAME, CHARTS_NAME = "report.html", "charts"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report.

    Attributes:
        page: the HTML page, which needs no other file.
        charts: image files, a PNG and an SVG per chart.
        rows: number of rows of all result files.
        counts: number of rows by status.
    """

    page: Path
    charts: tuple[Path, ...]
    rows: int
    counts: str


def write_report(
    results: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "Benchmark report",
    progress: bool = False,
) -> Report:
    """Write an HTML report of charts and tables, and each chart as PNG and SVG.

    Args:
        results: result files of `lightspine bench`, or their folders.
        out: folder for `report.html` and `charts/`, which is created.
        title: heading of the page.
        progress: show a progress bar on standard error.

    Raises:
        UsageError: there is no file, or one is given twice.
        LightspineError: a file cannot be read or is invalid, no row has a time, or writing fails.
    """
    loaded = _load_all(list(results))
    folder = Path(out)
    runs = [make_run_part(result, f"run-{number}") for number, result in enumerate(loaded, start=1)]
    charts = [chart for run in runs for chart in run.charts]
    paths: list[Path] = []
    svg: dict[str, bytes] = {}
    for chart in progress_bar(charts, "drawing", shown=progress):
        svg[chart.name] = chart.save("svg")
        for suffix, content in (("png", chart.save("png")), ("svg", svg[chart.name])):
            path = folder / CHARTS_NAME / f"{chart.name}.{suffix}"
            with atomic_write(path) as file:
                file.write(content)
            paths.append(path)
    rows = [row for result in loaded for row in result.rows]
    counts = count_rows(rows)
    atomic_write_text(folder / PAGE_NAME, render_page(title=title, counts=counts, runs=runs, svg=svg))
    return Report(page=folder / PAGE_NAME, charts=tuple(paths), rows=len(rows), counts=counts)


def _load_all(paths: list[str | Path]) -> list[BenchResult]:
    if not paths:
        raise UsageError("expected at least one result file of `lightspine bench`, got none")
    if repeated := [path for index, path in enumerate(paths) if path in paths[:index]]:
        raise UsageError(f"expected each result file once, got {repeated[0]} twice")
    loaded = [load_results(path) for path in paths]
    for path, result in zip(paths, loaded, strict=True):
        for number, row in enumerate(result.rows):
            for timing in (row.forward, row.train_step):
                # Times are drawn on a logarithmic axis.
                if timing is not None and not (timing.median_ms > 0 and isfinite(timing.median_ms)):
                    where = f"row {number} ({row.model})"
                    raise LightspineError(
                        f"expected times above zero, {path} has {timing.median_ms} ms in {where}"
                    )
    if not any(row.forward for result in loaded for row in result.rows):
        raise LightspineError(f"no row of {', '.join(map(str, paths))} has a time")
    return loaded
