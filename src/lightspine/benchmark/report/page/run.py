"""One result file as a part of the page: its charts and tables in the order in which they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightspine.benchmark.report.charts.chart import Chart, DrawnChart
from lightspine.benchmark.report.charts.modes import mode_charts
from lightspine.benchmark.report.charts.scatter import scatter_charts
from lightspine.benchmark.report.charts.steps import step_charts
from lightspine.benchmark.report.charts.sweep import sweep_charts
from lightspine.benchmark.report.charts.times import time_charts
from lightspine.benchmark.report.conditions import status_in_words
from lightspine.benchmark.report.page.facts import (
    command_line,
    count_in_words,
    run_about,
    run_facts,
    run_title,
    step_order,
)
from lightspine.benchmark.report.page.tables import Table, measurements_table
from lightspine.benchmark.report.sweeps import Exponent, exponents, find_series
from lightspine.benchmark.results import BenchResult, Row


@dataclass(frozen=True, kw_only=True)
class ChartSection:
    """Charts under one heading.

    Attributes:
        title: the heading.
        groups: the first chart of each group is shown, the others when asked for.
        exponents: lines of the table below the charts.
    """

    title: str
    groups: list[list[Chart]]
    exponents: Sequence[Exponent] = ()


@dataclass(frozen=True, kw_only=True)
class DrawnSection:
    """The same with its charts drawn."""

    title: str
    groups: list[list[DrawnChart]]
    exponents: Sequence[Exponent]


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """What the page says about one result file.

    Attributes:
        name: unique in the page, for links and files.
        title: its heading.
        about: what is compared, in a sentence or two; empty where nobody says it.
        counts: how many rows were measured and how many not.
        command: repeats the run.
        sections: the charts; those without data are not there.
        table: every row of the file.
        unmeasured: the rows that have no time, with the reason.
        facts: date, settings and rates.
    """

    name: str
    title: str
    about: str
    counts: str
    command: str
    sections: list[ChartSection]
    table: Table
    unmeasured: list[tuple[Row, str]]
    facts: list[tuple[str, str]]

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        return [chart for section in self.sections for group in section.groups for chart in group]

    def drawn(self, by_name: Callable[[str], DrawnChart]) -> list[DrawnSection]:
        """Return the sections with the drawn charts, which `by_name` finds."""
        return [
            DrawnSection(
                title=section.title,
                groups=[[by_name(chart.name) for chart in group] for group in section.groups],
                exponents=section.exponents,
            )
            for section in self.sections
        ]


def make_run_part(result: BenchResult, name: str) -> RunPart:
    """Choose what to show of a result file.

    Args:
        result: the file.
        name: unique in the page.
    """
    rows = [row for row in result.rows if row.status != "absent"]
    series, accuracy, steps = (
        find_series(rows),
        scatter_charts(rows, name),
        step_charts(result.rows, name, step_order(result)),
    )
    # Where accuracy, steps or sizes are charted, times stand there already.
    plain = [] if accuracy or steps or series else time_charts(rows, name)
    sections = [
        ChartSection(title="Accuracy against latency", groups=accuracy),
        ChartSection(title="Latency", groups=plain),
        ChartSection(title="Step by step", groups=steps),
        ChartSection(
            title="Cost against image size",
            groups=[[chart] for chart in sweep_charts(series, name)],
            exponents=exponents(series),
        ),
        ChartSection(title="Modes", groups=mode_charts(rows, name)),
    ]
    return RunPart(
        name=name,
        title=run_title(result),
        about=run_about(result),
        counts=count_in_words(result.rows),
        command=command_line(result),
        sections=[section for section in sections if section.groups],
        table=measurements_table(result.rows),
        unmeasured=[(row, status_in_words(row)) for row in result.rows if row.status != "ok"],
        facts=run_facts(result),
    )
