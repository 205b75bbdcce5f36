"""What every task does alike: rates over a real run, and randomness by position."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightspine.errors import UsageError
from lightspine.training.base import seed_generators
from lightspine.training.lr_schedules import CosineSchedule
from support.training import make_task, run

# 6 batches of 32 images an epoch.
SCHEDULE = CosineSchedule(
    epochs=4, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-4, unit="step", after_warmup=True, batch=64
)


class Rates(pl.Callback):
    """Keeps the rate of every step of the optimiser."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        optimizer = arguments[-1]
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 3), (4, 2)])
def test_rates_follow_the_schedule_and_the_total_batch(accumulate: int, steps: int, tmp_path: Path) -> None:
    rates = Rates()
    task = make_task(schedule=SCHEDULE, lr=1e-3)
    run(tmp_path / "run", task=task, epochs=4, accumulate_grad_batches=accumulate, callbacks=[rates])
    expected = [
        SCHEDULE.rate(step, lr=1e-3, steps_per_epoch=steps, total_batch=32 * accumulate)
        for step in range(4 * steps)
    ]
    assert rates.seen == pytest.approx(expected)


def test_run_that_ends_after_some_steps_begins_like_the_whole_one(tmp_path: Path) -> None:
    rates = Rates()
    run(
        tmp_path / "run", task=make_task(schedule=SCHEDULE, lr=1e-3), max_steps=9, epochs=4, callbacks=[rates]
    )
    expected = [SCHEDULE.rate(s, lr=1e-3, steps_per_epoch=6, total_batch=32) for s in range(9)]
    assert rates.seen == pytest.approx(expected)


def test_run_of_another_length_than_its_schedule_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lightspine"):
        run(tmp_path / "run", task=make_task(schedule=SCHEDULE), epochs=1)
    assert "the run has 1 epochs, its schedule 4" in caplog.text


def test_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trainer\.max_epochs or trainer\.max_steps"):
        run(tmp_path / "run", epochs=-1)


def test_random_numbers_depend_on_the_key_alone() -> None:
    def draw(*key: int) -> tuple[float, float]:
        seed_generators(*key)
        return torch.rand(1).item(), np.random.rand()

    first = draw(0, 1, 2, 3)
    torch.rand(100)
    assert draw(0, 1, 2, 3) == first
    others = [draw(1, 1, 2, 3), draw(0, 2, 2, 3), draw(0, 1, 3, 3), draw(0, 1, 2, 4)]
    assert len({first, *others}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_args": {"drop_path": 0.1}}, "wrong arguments of the model test_resnet: .*'drop_path'"),
        ({"schedule": CosineSchedule(epochs=0)}, "more than 0 epochs"),
        ({"agc": 0.0}, "agc above 0, got 0.0"),
        ({"teacher": {"kind": "hard"}}, "wrong settings under teacher: missing .*'teacher'"),
        ({"mesa": {"begin": 1}}, "wrong settings under mesa: .*'begin'"),
        ({"mesa": {}}, "expected an ema_decay and no teacher"),
    ],
)
def test_wrong_setting_is_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_task(**options)
    assert "\n" not in str(caught.value)
