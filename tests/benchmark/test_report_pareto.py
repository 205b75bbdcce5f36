"""The models that no other one beats."""

from lightspine.benchmark.report.pareto import pareto_front


def test_beaten_points_are_left_out() -> None:
    costs, scores = [1.0, 2.0, 3.0, 2.5], [70.0, 75.0, 74.0, 80.0]
    assert pareto_front(costs, scores) == [0, 1, 3]


def test_front_runs_from_cheap_to_dear_whatever_the_order() -> None:
    assert pareto_front([9.0, 1.0, 5.0], [90.0, 70.0, 80.0]) == [1, 2, 0]


def test_same_cost_keeps_the_better_score() -> None:
    assert pareto_front([1.0, 1.0], [70.0, 71.0]) == [1]


def test_same_score_keeps_the_cheaper_one() -> None:
    assert pareto_front([2.0, 1.0], [70.0, 70.0]) == [1]


def test_first_of_equal_points_stands_for_all() -> None:
    assert pareto_front([1.0, 1.0], [70.0, 70.0]) == [0]


def test_no_points_have_no_front() -> None:
    assert pareto_front([], []) == []
