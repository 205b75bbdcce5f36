"""Makes the report: reads result files, draws the charts, writes the page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from lightspine._version import __version__
from lightspine.benchmark.report.charts.chart import DrawnChart, draw_chart
from lightspine.benchmark.report.page.facts import count_in_words, system_facts
from lightspine.benchmark.report.page.html import render_page
from lightspine.benchmark.report.page.run import RunPart, make_run_part
from lightspine.benchmark.results import BenchResult, load_results
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_write, atomic_write_text
from lightspine.utils.progress import progress_bar

PAGE_NAME, CHARTS_NAME = "report.html", "charts"
DEFAULT_TITLE = "Benchmark report"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written.

    Attributes:
        page: the page, which needs no other file.
        charts: the pictures, two files each.
        rows: of all result files.
        counts: how many of them were measured and how many not.
    """

    page: Path
    charts: tuple[Path, ...]
    rows: int
    counts: str


def write_report(
    results: Sequence[str | Path], out: str | Path, *, title: str = DEFAULT_TITLE, progress: bool = False
) -> Report:
    """Make one page of charts and tables, and each chart as PNG and SVG beside it.

    The page is written last, so that it never shows what is not there.

    Args:
        results: files written by `lightspine bench`, or the folders that hold them.
        out: folder for `report.html` and `charts/`; made if it is not there.
        title: heading of the page.
        progress: whether a bar on the standard error tells how far it is.

    Raises:
        UsageError: no file is given, or one twice.
        LightspineError: a file cannot be read, is no result of `lightspine bench`, or no row of all files has
            a time; or the report cannot be written.
    """
    loaded = _load(results)
    folder = Path(out)
    runs = [make_run_part(result, f"run-{number}") for number, result in enumerate(loaded, start=1)]
    drawn: dict[str, DrawnChart] = {}
    paths: list[Path] = []
    charts = [chart for run in runs for chart in run.charts]
    for chart in progress_bar(charts, "drawing", shown=progress):
        drawn[chart.name] = draw_chart(chart)
        paths += _write_pictures(drawn[chart.name], folder / CHARTS_NAME)
    rows = [row for result in loaded for row in result.rows]
    counts = count_in_words(rows)
    page = render_page(
        title=title,
        counts=counts,
        runs=runs,
        systems=_systems(loaded, runs),
        chart=drawn.__getitem__,
        version=__version__,
    )
    atomic_write_text(folder / PAGE_NAME, page)
    return Report(page=folder / PAGE_NAME, charts=tuple(paths), rows=len(rows), counts=counts)


def _load(results: Iterable[str | Path]) -> list[BenchResult]:
    paths = list(results)
    if not paths:
        raise UsageError("expected at least one result file of `lightspine bench`, got none")
    if twice := [path for index, path in enumerate(paths) if path in paths[:index]]:
        raise UsageError(f"expected each result file once, got {twice[0]} twice")
    loaded = [load_results(path) for path in paths]
    for path, result in zip(paths, loaded, strict=True):
        _check_times(path, result)
    if not any(row.forward for result in loaded for row in result.rows):
        raise LightspineError(
            f"no row of {', '.join(map(str, paths))} has a time, so there is nothing to draw"
        )
    return loaded


def _check_times(path: str | Path, result: BenchResult) -> None:
    # A logarithm of anything else would end as a traceback in the middle of a drawing.
    for number, row in enumerate(result.rows):
        for one in (row.forward, row.train_step):
            if one is not None and not (one.median_ms > 0 and isfinite(one.median_ms)):
                raise LightspineError(
                    f"expected times above zero, {path} has {one.median_ms} ms in row {number} ({row.model})"
                )


def _write_pictures(drawn: DrawnChart, folder: Path) -> list[Path]:
    paths = []
    for suffix, content in (("png", drawn.png), ("svg", drawn.svg)):
        path = folder / f"{drawn.chart.name}.{suffix}"
        with atomic_write(path) as file:
            file.write(content)
        paths.append(path)
    return paths


def _systems(
    loaded: Sequence[BenchResult], runs: Sequence[RunPart]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each machine once, with the titles of the runs on it."""
    found: list[tuple[list[str], list[tuple[str, str]]]] = []
    for result, run in zip(loaded, runs, strict=True):
        facts = system_facts(result)
        titles = next((titles for titles, known in found if known == facts), None)
        if titles is None:
            found.append(([run.title], facts))
        else:
            titles.append(run.title)
    return [(", ".join(titles), facts) for titles, facts in found]
