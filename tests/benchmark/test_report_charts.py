"""What the charts of a report show, and which there are."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation

from lightspine.benchmark.report.charts.chart import Chart
from lightspine.benchmark.report.charts.labels import Box
from lightspine.benchmark.report.charts.modes import compare_modes, mode_charts
from lightspine.benchmark.report.charts.scatter import scatter_charts
from lightspine.benchmark.report.charts.steps import step_charts
from lightspine.benchmark.report.charts.style import FILE, NARROW, WIDE, Layout, report_style
from lightspine.benchmark.report.charts.times import time_charts
from lightspine.benchmark.report.numbers import TIMES
from lightspine.benchmark.results import PublishedFigures
from support.bench_results import a_row, a_timing, steps_result, table_result


def _texts(chart: Chart, layout: Layout) -> list[str]:
    with report_style():
        figure = chart.draw(layout).figure
        return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("layout", [FILE, WIDE, NARROW], ids=["file", "wide", "narrow"])
def test_names_in_a_crowded_scatter_do_not_overlap(layout: Layout) -> None:
    chart = scatter_charts(table_result().rows, "run")[0][0]
    with report_style():
        figure = chart.draw(layout).figure
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        labels = [child for child in figure.axes[0].get_children() if isinstance(child, Annotation)]
        # A little less than the box around the letters, in which they do not touch the edge.
        extents = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    boxes = [Box(*extent.extents).grown(-0.5) for extent in extents]
    assert len(boxes) > 20
    assert [pair for pair in combinations(boxes, 2) if pair[0].meets(pair[1])] == []


def test_ours_are_always_named_in_a_crowded_scatter() -> None:
    rows = table_result().rows
    texts = _texts(scatter_charts(rows, "run")[0][0], NARROW)
    assert {row.model for row in rows if row.source == "lightspine"} <= set(texts)


def test_names_without_room_are_counted() -> None:
    published = PublishedFigures(top1=70.0)
    rows = [a_row(f"timm/peer_number_{number}", published=published) for number in range(80)]
    chart = scatter_charts(rows, "run")[0][0]
    with report_style():
        note = chart.draw(WIDE).note
    assert note == f"{80 - len(_texts(chart, WIDE))} names found no room; the table has them all."


def test_scatter_takes_the_usual_size_of_a_model_with_several() -> None:
    best = PublishedFigures(top1=76.1)
    rows = [
        a_row("vim_tiny", height=side, width=side, forward=a_timing(side), published=best)
        for side in (448, 224)
    ]
    rows.append(a_row("shvit_s1", published=PublishedFigures(top1=70.0)))
    description = scatter_charts(rows, "run")[0][0].description
    assert "2 models" in description
    assert f"vim_tiny, 224{TIMES}224: 224.0 ms" in description


def test_models_without_published_accuracy_have_no_scatter() -> None:
    assert scatter_charts([a_row("shvit_s1"), a_row("shvit_s2")], "run") == []


def test_models_without_published_accuracy_stand_below_those_with() -> None:
    rows = [a_row(f"shvit_s{i}", published=PublishedFigures(top1=70.0 + i)) for i in (1, 2)]
    chart = scatter_charts([*rows, a_row("timm/resnet18")], "run")[0][0]
    with report_style():
        above, below = chart.draw(WIDE).figure.axes
    assert {text.get_text() for text in above.texts} == {"shvit_s1", "shvit_s2"}
    assert [text.get_text() for text in below.texts] == ["resnet18"]


def test_models_of_the_same_name_say_which_is_timms() -> None:
    published = PublishedFigures(top1=72.8)
    rows = [a_row("shvit_s1", source=source, published=published) for source in ("lightspine", "timm")]
    assert set(_texts(scatter_charts(rows, "run")[0][0], WIDE)) == {"shvit_s1", "shvit_s1 (timm)"}


def test_conditions_are_never_mixed_in_a_scatter() -> None:
    rows = [a_row(f"shvit_s{i}", published=PublishedFigures(top1=70.0 + i)) for i in (1, 2)]
    rows += [replace(row, threads=4) for row in rows] + [replace(row, dtype="bfloat16") for row in rows]
    groups = scatter_charts(rows, "run")
    assert [len(group) for group in groups] == [1, 1, 1]
    assert [("4 threads" in group[0].description) for group in groups] == [False, True, False]


def test_charts_of_two_types_have_titles_of_their_own() -> None:
    best = PublishedFigures(top1=76.1)
    rows = [
        a_row(name, published=best, dtype=dtype)
        for name in ("shvit_s1", "vim_tiny")
        for dtype in ("float32", "bfloat16")
    ]
    titles = [chart.title for charts in scatter_charts(rows, "run") for chart in charts]
    assert len(titles) == len(set(titles)) == 2


def test_ratio_of_a_mode_is_eager_time_over_its_own() -> None:
    rows = [a_row("shvit_s1", forward=a_timing(10.0)), a_row("shvit_s1", mode="onnx", forward=a_timing(4.0))]
    (model,) = compare_modes(rows)
    assert [bar.ratio for bar in model.bars] == [2.5]


def test_sizes_are_told_in_the_chart_of_modes_where_they_differ() -> None:
    rows = [
        a_row("vim_tiny", mode=mode, height=side, width=side)
        for side in (224, 448)
        for mode in ("eager", "optimized")
    ]
    with report_style():
        axes = mode_charts(rows, "run")[0][0].draw(WIDE).figure.axes[0]
    names = [tick.get_text().partition("\n")[0] for tick in axes.get_yticklabels()]
    assert names == [f"vim_tiny, 224{TIMES}224", f"vim_tiny, 448{TIMES}448"]


def test_mode_that_failed_is_named_in_the_chart() -> None:
    rows = [a_row("shvit_s1"), a_row("shvit_s1", mode="optimized")]
    rows.append(a_row("shvit_s1", mode="compile", forward=None, status="out_of_memory", error="too large"))
    assert "out of memory" in _texts(mode_charts(rows, "run")[0][0], WIDE)


def test_steps_show_measured_beside_published_rates() -> None:
    (group,) = step_charts(steps_result().rows, "run")
    texts = _texts(group[0], WIDE)
    assert f"6.76  (4.32{TIMES})" in texts
    assert f"1,686  (3.61{TIMES})" in texts


def test_absent_step_keeps_its_place_and_its_published_rate() -> None:
    rows = steps_result().rows
    rows[1] = replace(rows[1], status="absent", error="no such step", forward=None, height=0, width=0)
    texts = _texts(step_charts(rows, "run")[0][0], WIDE)
    assert texts[1] == "absent"
    assert texts[8].startswith("464 ")


def test_steps_stand_in_the_order_of_their_preset() -> None:
    (group,) = step_charts(steps_result().rows[::-1], "run", order=["(a)", "(b)", "(c)", "(d)"])
    with report_style():
        axes = group[0].draw(WIDE).figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()][:5] == ["(a)", "(b)", "(c)", "(d)", "(g)"]


def test_rate_published_of_an_absent_step_alone_is_not_charted() -> None:
    rows = [replace(row, published=None) for row in steps_result().rows]
    lost: dict[str, Any] = {"status": "absent", "error": "no such step", "forward": None}
    rows[1] = replace(steps_result().rows[1], height=0, width=0, **lost)
    with report_style():
        assert len(step_charts(rows, "run")[0][0].draw(WIDE).figure.axes) == 1


def test_dollar_signs_in_names_are_no_formula() -> None:
    rows = [
        a_row("a$b$c", published=PublishedFigures(top1=70.0)),
        a_row("d", published=PublishedFigures(top1=71.0)),
    ]
    assert "a$b$c" in _texts(scatter_charts(rows, "run")[0][0], WIDE)


def test_latencies_are_charted_for_each_mode() -> None:
    rows = [a_row("shvit_s1"), a_row("shvit_s1", mode="onnx", forward=a_timing(1234.5))]
    (group,) = time_charts(rows, "run")
    assert [_texts(chart, WIDE) for chart in group] == [["10.0"], ["1,234"]]
