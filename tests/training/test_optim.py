"""The optimiser of a task: settings, groups and proportions."""

import pytest
import torch
from torch import nn

from lightspine.models import get_record
from lightspine.training.optim import create_optimizer, schedule_by_step


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_adamw_has_the_published_settings() -> None:
    optimizer = create_optimizer(small_model(), "adamw", lr=1e-3, weight_decay=0.05)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_norms_and_biases_are_not_decayed_by_any_optimiser(name: str) -> None:
    model = small_model()
    optimizer = create_optimizer(model, name, lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight), id(model[3].weight)}


def test_frozen_parameters_are_left_out() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = create_optimizer(model, "adamw", lr=1e-3, weight_decay=0.05)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_decay_moves_a_weight_without_gradient_by_rate_times_decay() -> None:
    model = nn.Linear(1, 1)
    optimizer = create_optimizer(model, "adamw", lr=0.1, weight_decay=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.data, before["weight"] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(model.bias.data, before["bias"])


def test_schedule_keeps_the_proportions_of_layer_decay() -> None:
    model = get_record("shvit_s1").create(num_classes=10)
    optimizer = create_optimizer(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = schedule_by_step(optimizer, lambda step: 1 / (step + 1))["scheduler"]
    optimizer.step()
    scheduler.step()
    assert max(before) > min(before)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 2 for lr in before])
