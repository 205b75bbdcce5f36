"""Which models no other one beats in both accuracy and time."""

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the positions of the points that no other point beats, from the cheapest to the dearest.

    A point is beaten by one that costs no more and scores no less and differs in either; of equal points the
    first stands for all.

    Args:
        costs: lower is better.
        scores: higher is better, as many.
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], -scores[index], index)):
        if not front or scores[index] > scores[front[-1]]:
            front.append(index)
    return front
