"""Where labels stand beside their markers so that none covers another."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Beside the marker reads best, then above and below, then aslant; each ring a little farther out.
_ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202, 67, 113, 293, 247)
_DISTANCES = (2.5, 8.0, 15.0, 24.0, 34.0, 46.0)
_LEADER_FROM = 8.0
_STEP = 2.0
_CLEAR = 1.0


class Box(NamedTuple):
    """A rectangle; all lengths are in points of 1/72 inch."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def centre(self) -> tuple[float, float]:
        """Its middle."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def meets(self, other: "Box") -> bool:
        """Whether the two share more than an edge."""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def within(self, other: "Box") -> bool:
        """Whether it lies wholly in the other one."""
        return self.x0 >= other.x0 and self.x1 <= other.x1 and self.y0 >= other.y0 and self.y1 <= other.y1

    def grown(self, by: float) -> "Box":
        """Return it with a margin on each side."""
        return Box(self.x0 - by, self.y0 - by, self.x1 + by, self.y1 + by)


class Place(NamedTuple):
    """Where a label stands, and the line to its marker where it had to move away."""

    box: Box
    leader: tuple[tuple[float, float], tuple[float, float]] | None


def place_labels(
    markers: Sequence[Box], sizes: Sequence[tuple[float, float]], frame: Box, lines: Sequence[Box] = ()
) -> list[Place | None]:
    """Find a free place for each label; who comes first chooses first.

    Args:
        markers: the box of each marker, most important first.
        sizes: width and height of each marker's label.
        frame: no label leaves it.
        lines: what a label covers only if it finds no other place.

    Returns:
        A place for each label that meets no marker, no other label and no line to one; `None` where the
        picture has no room left within reach of the marker.
    """
    taken = np.array(markers, dtype=float).reshape(-1, 4)
    places: list[Place | None] = []
    for own, (marker, size) in enumerate(zip(markers, sizes, strict=True)):
        place = _first_place(own, taken, _candidates(marker, size, frame), lines)
        places.append(place)
        if place is not None:
            taken = np.vstack([taken, place.box.grown(_CLEAR), *_along(place)])
    return places


def _candidates(marker: Box, size: tuple[float, float], frame: Box) -> Iterator[Place]:
    (centre_x, centre_y), (width, height) = marker.centre, size
    radius = (marker.x1 - marker.x0) / 2
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # The label's nearest edge, not its middle, keeps the distance.
            x = centre_x + dx * (radius + distance) + _sign(dx) * width / 2
            y = centre_y + dy * (radius + distance) + _sign(dy) * height / 2
            box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if not box.within(frame):
                continue
            leader = None
            if distance >= _LEADER_FROM:
                end = (x - _sign(dx) * width / 2, y - _sign(dy) * height / 2)
                leader = ((centre_x + dx * radius, centre_y + dy * radius), end)
            yield Place(box, leader)


def _first_place(
    own: int, taken: np.ndarray, candidates: Iterable[Place], lines: Sequence[Box]
) -> Place | None:
    """Return the first free place that covers no line; the first that does where there is no other."""
    first = None
    for place in candidates:
        if not _is_free(place, own, taken):
            continue
        if not any(place.box.meets(line) for line in lines):
            return place
        first = first or place
    return first


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-6 else (1 if value > 0 else -1)


def _is_free(place: Place, own: int, taken: np.ndarray) -> bool:
    x0, y0, x1, y1 = np.array([place.box, *_along(place)]).T[:, :, None]
    meets = (x0 < taken[:, 2]) & (taken[:, 0] < x1) & (y0 < taken[:, 3]) & (taken[:, 1] < y1)
    # A line begins at the edge of its own marker.
    meets[:, own] = False
    return not meets.any()


def _along(place: Place) -> list[Box]:
    """Return small boxes that cover the line."""
    if place.leader is None:
        return []
    (x0, y0), (x1, y1) = place.leader
    steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / _STEP))
    points = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
    return [Box(x - 1, y - 1, x + 1, y + 1) for x, y in points]
