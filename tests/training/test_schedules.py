"""Learning rates against numbers worked out by hand."""

import pytest

from lightspine.errors import UsageError
from lightspine.training.schedules import CosineSchedule, warmup_cosine


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
        ({"batch": 0}, "at least 1, got 0"),
        ({"scale_ends": True}, "scale_ends is on"),
    ],
)
def test_wrong_value_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rate(0, **options)
