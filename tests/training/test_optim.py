"""Optimizer settings, weight-decay groups and layer-wise learning-rate decay."""

from typing import Any

import pytest
import torch
from torch import nn

import lightspine
from lightspine.dense import create_detector, create_segmenter
from lightspine.errors import UsageError
from lightspine.models import get_record
from lightspine.training.finetuning import freeze_stages
from lightspine.training.optim import (
    create_optimizer,
    dense_parameter_groups,
    layer_decay_groups,
    layer_lr_scales,
    lr_scheduler_config,
)
from support.training import make_loaded_model


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_adamw_has_the_published_settings() -> None:
    optimizer = create_optimizer(small_model(), "adamw", lr=1e-3, weight_decay=0.05)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_norms_and_biases_are_not_decayed_by_any_optimizer(name: str) -> None:
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
    scheduler = lr_scheduler_config(optimizer, lambda step: 1 / (step + 1))["scheduler"]
    optimizer.step()
    scheduler.step()
    assert max(before) > min(before)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 2 for lr in before])


FAMILIES = ["vmamba_tiny", "vim_tiny", "efficientvim_m1", "shvit_s1", "efficientmod_xxs"]


def test_rates_fall_by_the_same_factor_from_block_to_block() -> None:
    scales = layer_lr_scales(lightspine.create_model("vim_tiny", depth=4), 0.5)
    assert scales["head.weight"] == 1.0
    assert [scales[f"blocks.{i}.norm.weight"] for i in range(4)] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert scales["norm.weight"] == 1 / 2
    assert scales["stem.weight"] == scales["pos_embed"] == 1 / 32


def test_downsampling_goes_with_the_block_behind_it() -> None:
    scales = layer_lr_scales(lightspine.create_model("shvit_s1"), 0.9)
    assert (
        scales["stages.1.downsample.merge.conv1.conv.weight"]
        == scales["stages.1.blocks.0.ffn.pw1.conv.weight"]
    )
    # Stem, 2 + 4 + 5 blocks, classifier.
    assert scales["stem.0.conv.weight"] == pytest.approx(0.9**12)


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_hold_every_parameter_once_with_its_rate_and_decay(name: str) -> None:
    model = lightspine.create_model(name)
    groups = layer_decay_groups(model, lr=0.01, weight_decay=0.05, layer_decay=0.8)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    scales = layer_lr_scales(model, 0.8)
    spared = model.no_weight_decay()
    for key, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(0.01 * scales[key])
        undecayed = parameter.ndim == 1 or key.endswith(".bias") or key in spared
        assert group["weight_decay"] == (0.0 if undecayed else 0.05)


def test_groups_keep_their_proportions_under_a_schedule() -> None:
    groups = layer_decay_groups(
        lightspine.create_model("test_resnet"), lr=0.1, weight_decay=0.0, layer_decay=0.5
    )
    before = [group["lr"] for group in groups]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in before])


def test_groups_leave_frozen_parameters_out() -> None:
    model = make_loaded_model("shvit_s1")
    freeze_stages(model, 2)
    groups = layer_decay_groups(model, lr=0.1, weight_decay=0.0, layer_decay=0.5)
    trained = sum(p.numel() for group in groups for p in group["params"])
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layer_decay", [0.0, 1.5])
def test_layer_decay_out_of_range_is_refused(layer_decay: float) -> None:
    with pytest.raises(UsageError, match=f"above 0 and up to 1, got {layer_decay}"):
        layer_lr_scales(lightspine.create_model("test_resnet"), layer_decay)


def groups_by_name(network: Any, **options: Any) -> dict[str, tuple[float, float]]:
    """Return parameter name -> (learning rate, weight decay)."""
    groups = dense_parameter_groups(network, **{"lr": 1.0, "weight_decay": 0.1} | options)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in network.named_parameters() if id(p) in found}


@pytest.fixture(scope="module")
def vim() -> Any:
    return create_segmenter(
        "upernet",
        "vim_tiny",
        5,
        model_args={"dim": 32, "depth": 4, "img_size": 64, "out_indices": (0, 1, 2, 3)},
    )


@pytest.fixture(scope="module")
def vmamba() -> Any:
    arguments = {"embed_dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1)}
    return create_detector("mask_rcnn", "vmamba_tiny", 5, norm="layer", model_args=arguments, channels=16)


def test_every_parameter_is_in_one_group(vmamba: Any) -> None:
    groups = dense_parameter_groups(vmamba, lr=1.0, weight_decay=0.1, layer_decay=0.9)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in vmamba.parameters())


def test_usual_rule_spares_vectors_and_what_the_model_names(vim: Any) -> None:
    found = groups_by_name(vim)
    parameters = dict(vim.named_parameters())
    spared = {name for name, (_, decay) in found.items() if decay == 0}
    named = {name for name in spared if parameters[name].ndim > 1}
    assert all(parameters[name].ndim > 1 for name in set(found) - spared)
    assert {name.rpartition(".")[2] for name in named} == {"pos_embed", "cls_token"}


def test_parts_of_names_are_spared_and_nothing_else(vmamba: Any) -> None:
    found = groups_by_name(vmamba, undecayed=["norm"])
    assert {name for name, (_, decay) in found.items() if decay == 0} == {n for n in found if "norm" in n}


def test_empty_list_decays_everything(vmamba: Any) -> None:
    assert {decay for _, decay in groups_by_name(vmamba, undecayed=[]).values()} == {0.1}


def test_layers_learn_slower_towards_the_image(vim: Any) -> None:
    rates = {name: rate for name, (rate, _) in groups_by_name(vim, layer_decay=0.5).items()}
    prefix = "backbone.model.model."
    assert rates[f"{prefix}pos_embed"] == rates[f"{prefix}stem.weight"] == 0.5**5
    assert [rates[f"{prefix}blocks.{i}.mixer.out_proj.weight"] for i in range(4)] == [
        0.5**4,
        0.5**3,
        0.5**2,
        0.5,
    ]
    assert {rate for name, rate in rates.items() if not name.startswith(prefix)} == {1.0}


def test_blocks_can_be_left_out_of_the_layer_decay(vim: Any) -> None:
    found = groups_by_name(vim, layer_decay=0.5, layer_decay_blocks=False)
    slow = {name.removeprefix("backbone.model.model.") for name, (rate, _) in found.items() if rate < 1}
    assert {rate for rate, _ in found.values()} == {0.5**5, 1.0}
    assert {"pos_embed", "stem.weight", "stem.bias"} <= slow
    assert not any("blocks" in name for name in slow)


def test_frozen_parameters_of_a_detector_are_left_out() -> None:
    network = create_segmenter(
        "semantic_fpn", "test_efficientnet", 3, model_args={"out_indices": (1, 2, 3, 4)}
    )
    for parameter in network.backbone.parameters():
        parameter.requires_grad_(False)
    assert not any(name.startswith("backbone") for name in groups_by_name(network))


def test_one_step_moves_each_layer_by_its_rate(vim: Any) -> None:
    groups = dense_parameter_groups(vim, lr=1e-3, weight_decay=0.0, layer_decay=0.5)
    before = {name: p.detach().clone() for name, p in vim.named_parameters()}
    for parameter in vim.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(groups, lr=1e-3).step()
    moved = {name: float((before[name] - p.detach()).abs().max()) for name, p in vim.named_parameters()}
    assert moved["backbone.model.model.stem.weight"] == pytest.approx(1e-3 * 0.5**5, rel=1e-2)
    assert moved[
        "decoder.classifier.weight" if "decoder.classifier.weight" in moved else list(moved)[-1]
    ] == (pytest.approx(1e-3, rel=1e-2))


def test_wrong_layer_decay_is_refused(vim: Any) -> None:
    with pytest.raises(UsageError, match="expected a layer_decay above 0 and up to 1, got 2"):
        groups_by_name(vim, layer_decay=2)
