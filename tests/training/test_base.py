"""Base task: learning-rate schedule, random seeds, gradient clipping and invalid settings."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightspine.errors import LightspineError, UsageError
from lightspine.training.base import seed_generators
from lightspine.training.lr_schedules import CosineSchedule
from support.training import make_task, read_weights, run

# 6 batches of 32 images an epoch.
SCHEDULE = CosineSchedule(
    epochs=4, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-4, unit="step", after_warmup=True, batch=64
)


class Rates(pl.Callback):
    """Records the learning rate of every optimizer step."""

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


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_run_in_float64_is_resumed_exactly(ema_decay: float | None, tmp_path: Path) -> None:
    def options(epochs: int) -> dict[str, Any]:
        task = make_task(ema_decay=ema_decay, schedule=SCHEDULE)
        return {"task": task, "precision": "64-true", "epochs": epochs, "limit_train_batches": 2}

    whole = run(tmp_path / "whole", **options(2))
    run(tmp_path / "parts", **options(1))
    parts = run(tmp_path / "parts", resume="auto", **options(2))
    expected, found = read_weights(whole.last_checkpoint), read_weights(parts.last_checkpoint)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


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
        ({"model_args": {"drop_path": 0.1}}, "invalid arguments of the model test_resnet: .*'drop_path'"),
        ({"schedule": CosineSchedule(epochs=0)}, "more than 0 epochs"),
        ({"agc": 0.0}, "agc above 0, got 0.0"),
        ({"teacher": {"kind": "hard"}}, "invalid settings under teacher: missing .*'teacher'"),
        ({"mesa": {"begin": 1}}, "invalid settings under mesa: .*'begin'"),
        ({"mesa": {}}, "expected an ema_decay and no teacher"),
    ],
)
def test_wrong_setting_is_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_task(**options)
    assert "\n" not in str(caught.value)


class AtStep(pl.Callback):
    """Records the gradients of every optimizer step after clipping."""

    def __init__(self, measure: Any) -> None:
        self.measure = measure
        self.seen: list[float] = []

    def note(self, model: nn.Module) -> None:
        self.seen.append(self.measure(model))

    def on_train_start(self, trainer: pl.Trainer, task: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.note(task.model))


def global_norm(model: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def unit_norms(tensor: Tensor) -> Tensor:
    """Return the norm per output unit: a row of a linear layer, a filter, or a whole vector."""
    return tensor.norm() if tensor.dim() <= 1 else tensor.flatten(1).norm(dim=1)


def largest_ratio(model: nn.Module) -> float:
    ratios = [
        (unit_norms(p.grad) / unit_norms(p.detach()).clamp(min=1e-3)).max()
        for p in model.parameters()
        if p.grad is not None
    ]
    return float(max(ratios))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("limit", [5.0, 0.02])
def test_global_norm_is_at_most_the_limit(limit: float, accumulate: int, tmp_path: Path) -> None:
    probe = AtStep(global_norm)
    run(
        tmp_path / "run",
        epochs=1,
        gradient_clip=limit,
        accumulate_grad_batches=accumulate,
        callbacks=[probe],
        task=make_task(model_args={"drop_rate": 0.1}),
    )
    assert len(probe.seen) == 6 // accumulate
    assert max(probe.seen) <= limit * (1 + 1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_agc_bounds_every_unit_and_the_classifier_too(accumulate: int, tmp_path: Path) -> None:
    probe = AtStep(largest_ratio)
    task = make_task(agc=0.02, lr=1e-8)  # the weights of the ratio are those after the step
    run(tmp_path / "run", epochs=1, task=task, accumulate_grad_batches=accumulate, callbacks=[probe])
    assert len(probe.seen) == 6 // accumulate
    assert max(probe.seen) <= 0.02 * (1 + 1e-4)


def test_gradients_are_not_clipped_unless_asked_for(tmp_path: Path) -> None:
    probes = [AtStep(global_norm), AtStep(largest_ratio)]
    run(tmp_path / "run", epochs=1, callbacks=probes)
    assert max(probes[0].seen) > 0.02
    assert max(probes[1].seen) > 0.02


def test_agc_leaves_small_gradients_alone() -> None:
    task = make_task(agc=0.02)
    before = {}
    for name, parameter in task.model.named_parameters():
        parameter.grad = torch.full_like(parameter, 1e-9)
        before[name] = parameter.grad.clone()
    task.configure_gradient_clipping(torch.optim.SGD(task.parameters()))
    assert all(torch.equal(p.grad, before[name]) for name, p in task.model.named_parameters())


def test_gradients_of_a_fused_optimizer_are_clipped_in_mixed_precision(tmp_path: Path) -> None:
    probe = AtStep(global_norm)
    run(tmp_path / "run", epochs=1, precision="bf16-mixed", gradient_clip=0.1, callbacks=[probe])
    assert probe.seen == pytest.approx([0.1] * 6, rel=1e-3)


def test_skipped_steps_are_read_before_the_validation_and_the_checkpoint(tmp_path: Path) -> None:
    task = make_task(max_bad_steps=5)
    task.guard.deferred = True
    task.model.register_forward_hook(lambda _, __, logits: logits * float("nan"))
    with pytest.raises(LightspineError, match=r"6 non-finite steps in a row.*first: .*step 0 \(epoch 0\)"):
        run(tmp_path / "run", task=task, epochs=1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_two_ways_of_clipping_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"either agc or .* got both \(0.02 and 5.0\)"):
        run(tmp_path / "run", task=make_task(agc=0.02), gradient_clip=5.0)


@pytest.mark.parametrize(
    ("task_options", "run_options", "measure"),
    [({}, {"gradient_clip": 0.02}, global_norm), ({"agc": 0.02, "lr": 1e-8}, {}, largest_ratio)],
    ids=["norm", "agc"],
)
def test_gradients_are_unscaled_before_they_are_clipped(
    task_options: Any, run_options: Any, measure: Any, tmp_path: Path
) -> None:
    # Like 16-mixed on a GPU: a half-precision loss scaled by 1,024.
    scaled = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    probe = AtStep(measure)
    options = {"epochs": 1, "precision": None, "plugins": [scaled], "callbacks": [probe], **run_options}
    result = run(tmp_path / "run", task=make_task(**task_options), **options)
    assert len(probe.seen) == 6
    assert 0.01 < max(probe.seen) <= 0.02 * (1 + 1e-3)
    assert result.history[0]["skipped_steps"] == 0
