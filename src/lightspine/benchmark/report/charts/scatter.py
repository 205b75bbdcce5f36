"""The charts of accuracy against latency: who gets the most for its time."""

from collections.abc import Sequence
from functools import partial

from lightspine.benchmark.report.charts.chart import Chart
from lightspine.benchmark.report.charts.scatter_drawing import draw_scatter
from lightspine.benchmark.report.charts.scatter_points import Point, Timed, points_of
from lightspine.benchmark.report.conditions import Conditions, conditions_of, grouped, mode_order
from lightspine.benchmark.report.pareto import pareto_front
from lightspine.benchmark.results import Row

_FEWEST_POINTS = 2


def scatter_charts(rows: Sequence[Row], name: str) -> list[list[Chart]]:
    """Return the charts of each conditions under which two or more models with published accuracy ran.

    There is one for each mode, that with the most models first.

    Args:
        rows: of one result file.
        name: unique beginning of the charts' names.
    """
    charts: list[list[Chart]] = []
    for position, (conditions, alike) in enumerate(grouped(rows, conditions_of).items(), start=1):
        modes = grouped(alike, lambda row: row.mode)
        found = {mode: points_of(of_mode) for mode, of_mode in modes.items()}
        order = sorted(found, key=lambda mode: (-len(found[mode][0]), mode_order(mode)))
        charts.append(
            [
                _chart(*found[mode], conditions, mode, f"{name}-accuracy-{position}-{mode}")
                for mode in order
                if len(found[mode][0]) >= _FEWEST_POINTS
            ]
        )
    return [of_conditions for of_conditions in charts if of_conditions]


def _chart(points: list[Point], timed: list[Timed], conditions: Conditions, mode: str, name: str) -> Chart:
    front = pareto_front([point.latency_ms for point in points], [point.top1 for point in points])
    best = [points[index] for index in front]
    title = f"Accuracy against latency, {mode}, {conditions.headline}"
    return Chart(
        name=name,
        title=title,
        description=f"Published top-1 accuracy against measured latency of {len(points)} models, "
        f"mode {mode}, {conditions}. Not beaten in both by any other: {'; '.join(map(str, best))}."
        + (f" Without a published accuracy: {'; '.join(map(str, timed))}." if timed else ""),
        caption="Up and to the left is better. Accuracy is published (ImageNet-1k top-1); time is measured "
        "here. Filled marks are models of lightspine, hollow ones peers from timm. The stepped line joins "
        "the models that no other beats in both."
        + (" Models below the line have no published accuracy in the file." if timed else ""),
        draw=partial(draw_scatter, points=points, timed=timed, best=best, conditions=conditions, title=title),
    )
