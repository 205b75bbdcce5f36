"""Scatter plot of accuracy against latency: Pareto front and label placement."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from lightspine.benchmark.scatter import ScatterPoint, pareto_front, plot_accuracy_over_latency
from lightspine.errors import UsageError


def _point(label: str, latency_ms: float, accuracy: float, *, keep: bool = False) -> ScatterPoint:
    return ScatterPoint(label=label, latency_ms=latency_ms, accuracy=accuracy, keep_label=keep)


def _plot(points: list[ScatterPoint]) -> tuple[Axes, dict[str, Bbox], list[str]]:
    """Return the axes, the bounding boxes of the labels, and the labels that did not fit."""
    figure, unplaced = plot_accuracy_over_latency(
        points, title="title", note="note", x_label="latency", y_label="accuracy"
    )
    return figure.axes[0], _label_boxes(figure), unplaced


def _label_boxes(figure: Figure) -> dict[str, Bbox]:
    renderer = FigureCanvasAgg(figure).get_renderer()
    labels = [child for child in figure.axes[0].get_children() if isinstance(child, Annotation)]
    return {label.get_text(): label.get_window_extent(renderer) for label in labels}


def _center(axes: Axes, point: ScatterPoint) -> tuple[float, float]:
    x, y = axes.transData.transform((point.latency_ms, point.accuracy))
    return float(x), float(y)


def _overlaps(first: Bbox, second: Bbox) -> bool:
    shared = Bbox.intersection(first, second)
    return shared is not None and min(shared.width, shared.height) > 0.1


def _front(costs: list[float], scores: list[float]) -> list[int]:
    return pareto_front([_point("", cost, score) for cost, score in zip(costs, scores, strict=True)])


def test_beaten_points_are_not_on_the_front() -> None:
    assert _front([1.0, 2.0, 3.0, 2.5], [70.0, 75.0, 74.0, 80.0]) == [0, 1, 3]


def test_front_is_sorted_by_latency() -> None:
    assert _front([9.0, 1.0, 5.0], [90.0, 70.0, 80.0]) == [1, 2, 0]


def test_same_latency_keeps_the_higher_accuracy() -> None:
    assert _front([1.0, 1.0], [70.0, 71.0]) == [1]


def test_same_accuracy_keeps_the_lower_latency() -> None:
    assert _front([2.0, 1.0], [70.0, 70.0]) == [1]


def test_first_of_equal_points_is_on_the_front() -> None:
    assert _front([1.0, 1.0], [70.0, 70.0]) == [0]


def test_no_points_have_no_front() -> None:
    assert _front([], []) == []


def test_no_point_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one model"):
        _plot([])


def test_label_of_a_single_marker_is_beside_it() -> None:
    point = _point("name", 10, 70)
    axes, boxes, _ = _plot([point])
    x, y = _center(axes, point)
    assert 3 < boxes["name"].x0 - x < 10
    assert abs((boxes["name"].y0 + boxes["name"].y1) / 2 - y) < 1
    # The only line is the Pareto front: a label beside its marker has no leader.
    assert len(axes.lines) == 1


def test_marker_is_at_its_latency_and_accuracy() -> None:
    axes, _, _ = _plot([_point("name", 10, 70)])
    [markers] = axes.collections
    assert markers.get_offsets().tolist() == [[10, 70]]  # type: ignore[union-attr]


def test_kept_labels_of_near_models_do_not_overlap() -> None:
    crowded = [
        ScatterPoint(
            label=f"model_{i}  5.0M", latency_ms=10 + 0.2 * i, accuracy=90 + 0.1 * i, params=5_000_000
        )
        for i in range(6)
    ]
    far = ScatterPoint(label="other", latency_ms=40, accuracy=80, params=90_000_000)
    _, boxes, _ = _plot([*crowded, far])
    assert len(boxes) == 7
    assert not [pair for pair in combinations(boxes.values(), 2) if _overlaps(*pair)]


def test_label_at_the_right_edge_is_on_the_left() -> None:
    points = [_point("left", 1, 70), _point("a label that is too long for the space on the right", 100, 75)]
    axes, boxes, _ = _plot(points)
    assert boxes[points[1].label].x1 < _center(axes, points[1])[0]


def test_label_in_a_crowd_has_a_line_to_its_marker() -> None:
    crowd = [
        _point(f"model {column} and {row}", 10 + 0.2 * column, 70 + 0.05 * row)
        for column in range(3)
        for row in range(3)
    ]
    axes, _, _ = _plot([*crowd, _point("far", 40, 75)])
    assert len(axes.lines) > 1


def test_label_without_space_is_reported_or_kept() -> None:
    same_place = [_point(f"a rather long label {number:02}", 10, 70) for number in range(40)]
    _, boxes, unplaced = _plot(same_place)
    assert unplaced
    assert len(boxes) + len(unplaced) == 40
    kept = [_point(point.label, 10, 70, keep=True) for point in same_place]
    assert len(_plot(kept)[1]) == 40


def test_our_models_are_labelled_first() -> None:
    peers = [_point(f"peer number {number:02}", 10, 70) for number in range(40)]
    ours = ScatterPoint(label="ours", latency_ms=10, accuracy=70, family="vim", keep_label=False)
    assert "ours" in _plot([*peers, ours])[1]


def test_marker_area_grows_with_the_parameters() -> None:
    small, large = (
        ScatterPoint(label="", latency_ms=1, accuracy=1, params=params) for params in (10**6, 10**8)
    )
    assert small.area < large.area


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 400), st.floats(60, 85)), min_size=1, max_size=20))
def test_labels_cover_no_label_and_no_marker_and_stay_inside(places: list[tuple[float, float]]) -> None:
    points = [_point(f"model {number}", *place) for number, place in enumerate(places)]
    axes, boxes, _ = _plot(points)
    frame = axes.get_window_extent()
    assert not [pair for pair in combinations(boxes.values(), 2) if _overlaps(*pair)]
    for point in points:
        x, y = _center(axes, point)
        marker = Bbox.from_extents(x - 3, y - 3, x + 3, y + 3)
        assert not [box for box in boxes.values() if _overlaps(box, marker)]
    for box in boxes.values():
        assert frame.x0 - 0.1 <= box.x0
        assert box.x1 <= frame.x1 + 0.1
        assert frame.y0 - 0.1 <= box.y0
        assert box.y1 <= frame.y1 + 0.1
