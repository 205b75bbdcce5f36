"""Learning-rate schedules against hand-computed values."""

import math
from typing import Any

import pytest

from lightspine.errors import UsageError
from lightspine.training.lr_schedules import CosineSchedule, DecaySchedule, MilestoneSchedule, warmup_cosine


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1 / 11), (9, 10 / 11), (10, 1.0), (60, 0.505), (110, 0.01), (500, 0.01)],
)
def test_rate_rises_linearly_and_falls_as_cosine(step: int, factor: float) -> None:
    assert warmup_cosine(step, warmup=10, total=110, floor=0.01) == pytest.approx(factor)


def test_rate_starts_at_full_height_without_warmup() -> None:
    assert warmup_cosine(0, warmup=0, total=100, floor=0.0) == 1.0


# Ten steps an epoch.
BASE = {"epochs": 100, "warmup_epochs": 10, "warmup_lr": 0.1, "min_lr": 0.2}


def rate(step: int, *, total_batch: int = 64, **options: object) -> float:
    schedule = CosineSchedule(**BASE | options)
    schedule.check()
    return schedule.rate(step, lr=1.0, steps_per_epoch=10, total_batch=total_batch)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),
        (50, 0.55),  # half of the warm-up
        (100, 0.2 + 0.8 * 0.975528),  # the cosine has run since the first epoch: cos(pi / 10)
        (500, 0.6),  # half of the epochs
        (1000, 0.2),
        (5000, 0.2),
    ],
)
def test_cosine_runs_since_the_first_epoch(step: int, expected: float) -> None:
    assert rate(step) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("step", "expected"), [(99, 0.991), (100, 1.0), (550, 0.6), (1000, 0.2)])
def test_cosine_begins_after_the_warmup(step: int, expected: float) -> None:
    assert rate(step, after_warmup=True) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (9, 0.1), (10, 0.19), (19, 0.19), (20, 0.28)])
def test_rate_by_epochs_stays_through_an_epoch(step: int, expected: float) -> None:
    assert rate(step, unit="epoch") == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (19, 0.1), (20, 0.19), (1010, 0.2)])
def test_lagging_schedule_has_two_first_epochs(step: int, expected: float) -> None:
    assert rate(step, unit="epoch", lag_epochs=1) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (1, 0.1), (2, 0.109), (101, 1.0), (1001, 0.2)])
def test_schedule_that_lags_a_step_has_two_first_steps(step: int, expected: float) -> None:
    assert rate(step, after_warmup=True, lag_steps=1) == pytest.approx(expected)


def test_highest_rate_follows_the_batch_size() -> None:
    assert rate(100, total_batch=128, batch=64, after_warmup=True) == pytest.approx(2.0)
    assert rate(0, total_batch=128, batch=64) == pytest.approx(0.1)


def test_ends_follow_the_batch_size_where_they_are_given_for_it() -> None:
    assert rate(0, total_batch=128, batch=64, scale_ends=True) == pytest.approx(0.2)
    assert rate(1000, total_batch=128, batch=64, scale_ends=True) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "more than 0 epochs, got 0"),
        ({"warmup_epochs": 100}, "less than 100 epochs, got 100"),
        ({"min_lr": -1}, "min_lr of at least 0, got -1"),
        ({"lag_steps": -1}, "lag_steps of at least 0, got -1"),
        ({"lag_steps": 1, "unit": "epoch"}, "expected unit 'step' in a schedule with lag_steps, got 'epoch'"),
        ({"batch": 0}, "at least 1, got 0"),
        ({"scale_ends": True}, "expected `batch` in a schedule with scale_ends"),
    ],
)
def test_wrong_value_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rate(0, **options)


COCO_1X = MilestoneSchedule(milestones=(8, 11), length=12, warmup_steps=500, warmup_ratio=0.001)


def dense_rate(schedule: Any, step: int, lr: float = 2e-4, steps_per_epoch: int = 7330) -> float:
    return float(schedule.rate(step, lr=lr, steps_per_epoch=steps_per_epoch, total_batch=16))


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.001),
        (250, 1 - 0.5 * 0.999),
        (499, 1 - 0.002 * 0.999),
        (500, 1.0),
        (8 * 7330 - 1, 1.0),
        (8 * 7330, 0.1),
        (11 * 7330 - 1, 0.1),
        (11 * 7330, 0.01),
        (12 * 7330 - 1, 0.01),
    ],
)
def test_milestones_of_a_1x_run(step: int, factor: float) -> None:
    assert dense_rate(COCO_1X, step) == pytest.approx(2e-4 * factor, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "factor"), [(163_888, 1.0), (163_889, 0.1), (177_545, 0.1), (177_546, 0.01)]
)
def test_milestones_counted_in_steps(step: int, factor: float) -> None:
    schedule = MilestoneSchedule(milestones=(163_889, 177_546), length=184_375, unit="step", warmup_steps=250)
    assert dense_rate(schedule, step) == pytest.approx(2e-4 * factor, rel=1e-12)


@pytest.mark.parametrize("after", [False, True])
def test_polynomial_decay_with_warm_up(after: bool) -> None:
    schedule = DecaySchedule(
        steps=160_000, power=0.9, min_lr=1e-6, warmup_steps=1500, warmup_ratio=1e-6, after_warmup=after
    )
    for step in (0, 1, 749, 1499, 1500, 80_000, 159_999):
        share = (max(step - 1500, 0) / 158_500) if after else step / 160_000
        warm = 1.0 if step >= 1500 else 1 - (1 - step / 1500) * (1 - 1e-6)
        expected = (1e-6 + (2e-4 - 1e-6) * (1 - share) ** 0.9) * warm
        assert dense_rate(schedule, step) == pytest.approx(expected, rel=1e-12)


def test_cosine_decay_with_warm_up() -> None:
    schedule = DecaySchedule(steps=40_000, shape="cosine", warmup_steps=1000, warmup_ratio=0.1)
    assert dense_rate(schedule, 0) == pytest.approx(2e-5, rel=1e-12)
    assert dense_rate(schedule, 20_000) == pytest.approx(1e-4, rel=1e-12)
    assert dense_rate(schedule, 39_999) == pytest.approx(
        1e-4 * (1 + math.cos(math.pi * 39_999 / 40_000)), rel=1e-9
    )


def test_decay_ends_at_the_smallest_rate() -> None:
    assert dense_rate(DecaySchedule(steps=10, min_lr=1e-6), 10) == pytest.approx(1e-6, rel=1e-12)


def test_length_is_told_in_the_schedules_own_unit() -> None:
    by_step = MilestoneSchedule(milestones=(5,), length=9, unit="step")
    lengths = [(s.total_epochs, s.total_steps) for s in (COCO_1X, by_step, DecaySchedule(steps=10))]
    assert lengths == [(12, None), (None, 9), (None, 10)]


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (MilestoneSchedule(milestones=(11, 8), length=12), "expected increasing milestones between 0 and"),
        (MilestoneSchedule(milestones=(8, 12), length=12), "expected increasing milestones between 0 and"),
        (MilestoneSchedule(milestones=(8,), length=12, gamma=0), "expected a gamma above 0"),
        (MilestoneSchedule(milestones=(8,), length=12, warmup_ratio=2), "a warmup_ratio from 0 to 1"),
        (DecaySchedule(steps=100, warmup_steps=100), "a warm-up from 0 to less than the 100 steps"),
        (DecaySchedule(steps=100, power=-1), "expected power of at least 0"),
    ],
)
def test_wrong_dense_schedule_is_refused(schedule: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        schedule.check()
