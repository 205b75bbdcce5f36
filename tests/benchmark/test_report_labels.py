"""Places of labels beside their markers."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from lightspine.benchmark.report.charts.labels import Box, Place, place_labels

FRAME = Box(0, 0, 400, 300)
LABEL = (60.0, 9.0)


def _marker(x: float, y: float) -> Box:
    return Box(x - 3, y - 3, x + 3, y + 3)


def _found(places: list[Place | None]) -> list[Place]:
    return [place for place in places if place is not None]


def test_label_of_a_lonely_marker_stands_right_beside_it() -> None:
    (place,) = _found(place_labels([_marker(200, 150)], [LABEL], FRAME))
    assert 203 < place.box.x0 < 210
    assert place.box.centre[1] == 150
    assert place.leader is None


def test_label_at_the_right_edge_stands_on_the_left() -> None:
    (place,) = _found(place_labels([_marker(390, 150)], [LABEL], FRAME))
    assert place.box.x1 < 390


def test_label_that_moves_away_has_a_line_to_its_marker() -> None:
    crowd = [_marker(200 + dx, 150 + dy) for dx in (-12, 0, 12) for dy in (-12, 0, 12)]
    middle = crowd.pop(4)
    place = place_labels([middle, *crowd], [LABEL] * 9, FRAME)[0]
    assert place is not None
    assert place.leader is not None


def test_label_without_room_is_left_out() -> None:
    assert place_labels([_marker(10, 10)], [(60.0, 9.0)], Box(0, 0, 20, 20)) == [None]


def test_first_label_takes_the_place_that_both_want() -> None:
    markers = [_marker(200, 150), _marker(200, 150)]
    first, second = place_labels(markers, [LABEL] * 2, FRAME)
    alone = place_labels(markers[:1], [LABEL], FRAME)[0]
    assert first == alone
    assert second is None or not second.box.meets(first.box if first else FRAME)


def test_label_keeps_off_a_line_where_it_can() -> None:
    line = Box(200, 149.5, 400, 150.5)
    (place,) = _found(place_labels([_marker(200, 150)], [LABEL], FRAME, [line]))
    assert not place.box.meets(line)


def test_label_covers_a_line_rather_than_being_left_out() -> None:
    everywhere = [Box(0, y, 400, y + 1) for y in range(0, 300, 2)]
    assert _found(place_labels([_marker(200, 150)], [LABEL], FRAME, everywhere))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(5, 395), st.floats(5, 295)), min_size=1, max_size=25))
def test_no_label_covers_another_nor_a_marker_nor_leaves_the_frame(
    centres: list[tuple[float, float]],
) -> None:
    markers = [_marker(x, y) for x, y in centres]
    places = _found(place_labels(markers, [LABEL] * len(markers), FRAME))
    assert all(place.box.within(FRAME) for place in places)
    assert not any(place.box.meets(marker) for place in places for marker in markers)
    assert not any(one.box.meets(other.box) for one, other in combinations(places, 2))
