"""Charts of a benchmark report."""

from dataclasses import replace

from lightspine.benchmark.report.charts import (
    Chart,
    accuracy_charts,
    compare_with_eager,
    latency_charts,
    mode_charts,
    sweep_charts,
    training_charts,
)
from lightspine.benchmark.report.conditions import TIMES
from lightspine.benchmark.report.sweeps import find_sweeps
from lightspine.benchmark.results import PublishedFigures
from support.bench_results import a_row, a_timing, sizes_result, steps_result, table_result


def _texts(chart: Chart) -> list[str]:
    return [text.get_text() for axes in chart.figure.axes for text in axes.texts]


def _tick_labels(chart: Chart) -> list[str]:
    return [tick.get_text() for tick in chart.figure.axes[0].get_yticklabels()]


def test_ours_are_always_named_in_a_crowded_scatter() -> None:
    rows = table_result().rows
    texts = _texts(accuracy_charts(rows, "run")[0])
    assert {row.model for row in rows if row.source == "lightspine"} <= set(texts)


def test_names_without_room_are_counted() -> None:
    published = PublishedFigures(top1=70.0)
    rows = [a_row(f"timm/peer_number_{number}", published=published) for number in range(80)]
    chart = accuracy_charts(rows, "run")[0]
    assert f"{80 - len(_texts(chart))} labels did not fit; the table lists all models." in chart.caption


def test_scatter_takes_the_usual_size_of_a_model_with_several() -> None:
    best = PublishedFigures(top1=76.1)
    rows = [
        a_row("vim_tiny", height=side, width=side, forward=a_timing(side), published=best)
        for side in (448, 224)
    ]
    rows.append(a_row("shvit_s1", published=PublishedFigures(top1=70.0)))
    description = accuracy_charts(rows, "run")[0].alt
    assert "2 models" in description
    assert f"vim_tiny, 224{TIMES}224: 224.0 ms" in description


def test_models_without_published_accuracy_have_no_scatter() -> None:
    assert accuracy_charts([a_row("shvit_s1"), a_row("shvit_s2")], "run") == []


def test_models_without_published_accuracy_are_not_in_the_scatter() -> None:
    rows = [a_row(f"shvit_s{i}", published=PublishedFigures(top1=70.0 + i)) for i in (1, 2)]
    chart = accuracy_charts([*rows, a_row("timm/resnet18")], "run")[0]
    assert set(_texts(chart)) == {"shvit_s1", "shvit_s2"}


def test_models_of_the_same_name_say_which_is_timms() -> None:
    published = PublishedFigures(top1=72.8)
    rows = [a_row("shvit_s1", source=source, published=published) for source in ("lightspine", "timm")]
    assert set(_texts(accuracy_charts(rows, "run")[0])) == {"shvit_s1", "shvit_s1 (timm)"}


def test_conditions_are_never_mixed_in_a_scatter() -> None:
    rows = [a_row(f"shvit_s{i}", published=PublishedFigures(top1=70.0 + i)) for i in (1, 2)]
    rows += [replace(row, threads=4) for row in rows] + [replace(row, dtype="bfloat16") for row in rows]
    charts = accuracy_charts(rows, "run")
    assert [("4 threads" in chart.alt) for chart in charts] == [False, True, False]


def test_charts_of_two_types_have_titles_of_their_own() -> None:
    best = PublishedFigures(top1=76.1)
    rows = [
        a_row(name, published=best, dtype=dtype)
        for name in ("shvit_s1", "vim_tiny")
        for dtype in ("float32", "bfloat16")
    ]
    titles = [chart.title for chart in accuracy_charts(rows, "run")]
    assert len(titles) == len(set(titles)) == 2


def test_ratio_of_a_mode_is_eager_time_over_its_own() -> None:
    rows = [a_row("shvit_s1", forward=a_timing(10.0)), a_row("shvit_s1", mode="onnx", forward=a_timing(4.0))]
    [(_, others)] = compare_with_eager(rows)
    assert [speedup for _, speedup in others] == [2.5]


def test_sizes_are_told_in_the_chart_of_modes_where_they_differ() -> None:
    rows = [
        a_row("vim_tiny", mode=mode, height=side, width=side)
        for side in (224, 448)
        for mode in ("eager", "optimized")
    ]
    names = [label.partition("\n")[0] for label in _tick_labels(mode_charts(rows, "run")[0])]
    assert names == [f"vim_tiny, 224{TIMES}224", f"vim_tiny, 448{TIMES}448"]


def test_mode_that_failed_is_named_in_the_chart() -> None:
    rows = [a_row("shvit_s1"), a_row("shvit_s1", mode="optimized")]
    rows.append(a_row("shvit_s1", mode="compile", forward=None, status="out_of_memory", error="too large"))
    assert "out of memory" in _texts(mode_charts(rows, "run")[0])


def test_variants_of_a_model_have_a_bar_each_in_the_order_of_the_file() -> None:
    [chart] = latency_charts(steps_result().rows, "run")
    assert _tick_labels(chart) == [f"vmamba_tiny (({letter}))" for letter in "abcdefg"]
    assert _texts(chart)[0] == "640"


def test_training_steps_are_charted_where_they_were_measured() -> None:
    rows = [a_row("shvit_s1", train_step=a_timing(31.0)), a_row("shvit_s2")]
    [chart] = training_charts(rows, "run")
    assert _texts(chart) == ["31.0"]
    assert training_charts(rows[1:], "run") == []


def test_sweep_has_a_panel_for_time_and_one_for_memory() -> None:
    inference, training = sweep_charts(find_sweeps(sizes_result().rows), "run")
    assert [axes.get_ylabel() for axes in inference.figure.axes] == [
        "forward pass in ms",
        "memory, forward in MiB",
    ]
    assert [axes.get_ylabel() for axes in training.figure.axes] == [
        "training step in ms",
        "memory, training in MiB",
    ]


def test_size_that_ran_out_of_memory_is_a_cross_in_the_sweep() -> None:
    inference, _ = sweep_charts(find_sweeps(sizes_result().rows), "run")
    crosses = [
        line for line in inference.figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())
    ]  # type: ignore[arg-type]
    [cross] = crosses
    assert list(cross.get_xdata()) == [1344 * 1344]  # type: ignore[arg-type]


def test_dollar_signs_in_names_are_no_formula() -> None:
    rows = [
        a_row("a$b$c", published=PublishedFigures(top1=70.0)),
        a_row("d", published=PublishedFigures(top1=71.0)),
    ]
    assert "a$b$c" in _texts(accuracy_charts(rows, "run")[0])


def test_latencies_are_charted_for_each_mode() -> None:
    rows = [a_row("shvit_s1"), a_row("shvit_s1", mode="onnx", forward=a_timing(1234.5))]
    assert [_texts(chart) for chart in latency_charts(rows, "run")] == [["10.0"], ["1,234"]]
