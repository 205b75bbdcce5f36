"""Which parameters of a detector or segmenter are decayed, and at which rate they learn."""

from typing import Any

import pytest
import torch

from lightspine.dense import create_detector, create_segmenter
from lightspine.errors import UsageError
from lightspine.training.dense_groups import dense_parameter_groups


def groups_by_name(network: Any, **options: Any) -> dict[str, tuple[float, float]]:
    """Return parameter name -> (rate, decay)."""
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


def test_frozen_parameters_are_left_out() -> None:
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
