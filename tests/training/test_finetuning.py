"""Fine-tuning: frozen stages, the summary of loaded weights, and other strides and sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightspine
from lightspine.errors import UsageError
from lightspine.training.finetuning import (
    describe_start,
    freeze_stages,
    hold_frozen,
)
from support.fill import fill_tensor
from support.reference import assert_close, read_figure
from support.training import make_loaded_model

FAMILIES = ["vmamba_tiny", "vim_tiny", "efficientvim_m1", "shvit_s1", "efficientmod_xxs"]


def first_block(name: str) -> str:
    return "blocks.0" if name.startswith("vim") else "stages.0"


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_stages_keep_weights_and_statistics_in_training(name: str) -> None:
    torch.manual_seed(0)
    model = make_loaded_model(name, num_classes=3, drop_path_rate=0.1)
    names = freeze_stages(model, 1)
    assert names == ["stem", first_block(name)]
    hold_frozen(model.train(), names)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in changed if key.startswith(tuple(f"{frozen}." for frozen in names))]
    assert any(key.startswith("head") for key in changed)


def test_frozen_stages_follow_the_images_unless_they_are_held() -> None:
    model = make_loaded_model("shvit_s1", num_classes=3)
    names = freeze_stages(model, 0)
    assert not model.stem.training
    model.train()
    assert model.stem.training
    hold_frozen(model, names)
    assert not any(module.training for module in model.stem.modules())
    assert model.stages[0].training


def test_position_table_and_class_token_are_frozen_with_the_stem() -> None:
    model = make_loaded_model("vim_tiny", depth=4)
    freeze_stages(model, 0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"cls_token", "pos_embed", "stem.weight", "stem.bias"}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_stages_frozen_leave_norms_and_classifier_to_train(name: str) -> None:
    model = make_loaded_model(name)
    stages = 24 if name == "vim_tiny" else len(model.stages)
    freeze_stages(model, stages)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained <= {"head", "norm"}
    assert "head" in trained
    with pytest.raises(UsageError, match=f"expected 0 to {stages} frozen stages of {name}, got {stages + 1}"):
        freeze_stages(model, stages + 1)


def test_stages_of_a_timm_model_are_frozen() -> None:
    assert freeze_stages(make_loaded_model("test_resnet"), 1) == ["conv1", "bn1", "layer1"]


def test_freezing_random_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="frozen stages of shvit_s1 would keep random weights"):
        freeze_stages(lightspine.create_model("shvit_s1"), 0)


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a model with a group_matcher, got Linear"):
        freeze_stages(nn.Linear(2, 2), 0)


def test_start_tells_what_was_loaded_what_is_new_and_what_is_frozen(tmp_path: Path) -> None:
    source = lightspine.create_model("shvit_s1")
    torch.save({"model": source.state_dict()}, tmp_path / "shvit.pth")
    model = lightspine.create_model("shvit_s1", num_classes=5, checkpoint=tmp_path / "shvit.pth")
    freeze_stages(model, 0)
    told = describe_start(model)
    assert f"{len(source.state_dict()) - 2} tensors of {tmp_path / 'shvit.pth'}" in told
    assert "2 new ones (head.fc.weight, head.fc.bias)" in told
    frozen = sum(p.numel() for p in model.stem.parameters())
    assert f"{frozen:,} of " in told


def test_start_without_a_checkpoint_says_so() -> None:
    assert describe_start(lightspine.create_model("test_resnet")) == "test_resnet starts from random weights"


def stride_16_weights(**options: Any) -> dict[str, Any]:
    """Return weights of a two-layer Vim-Ti with the position embedding of the official figure."""
    weights = lightspine.create_model("vim_tiny", depth=2, **options).state_dict()
    weights["pos_embed"] = torch.from_numpy(fill_tensor("pos_embed", (1, 197, 192)))
    return {"model": weights}


def test_stride_8_starts_from_stride_16_with_the_class_row_in_the_middle() -> None:
    source = stride_16_weights()
    model = lightspine.create_model("vim_tiny_plus", depth=2, checkpoint=source)
    assert model.grid_size == (27, 27)
    assert torch.equal(model.pos_embed[0, 364], source["model"]["pos_embed"][0, 98])
    assert model.load_report.converted == {"pos_embed": "computed"}
    assert "pos_embed resized to fit" in describe_start(model)
    tensors = model.state_dict()
    others = [key for key in tensors if key != "pos_embed"]
    assert all(torch.equal(tensors[key], source["model"][key]) for key in others)
    assert model.eval()(torch.zeros(1, 3, 224, 224)).isfinite().all()


def test_stride_8_starts_as_the_official_script_does_on_request() -> None:
    figure = read_figure("vim/vim_pos_embed")
    model = lightspine.create_model(
        "vim_tiny_plus", depth=2, checkpoint=stride_16_weights(), pos_embed_resize="official"
    )
    for row in (0, 1, 364, 729):
        assert_close(f"row {row}", model.pos_embed[0, row, :4], figure[f"row{row}_first4"], 1e-5)


@pytest.mark.parametrize("options", [{"class_token": "double"}, {"pos_embed": False}])
def test_official_resizing_is_refused_where_there_is_no_such_table(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="needs a position table with at most one class token"):
        lightspine.create_model("vim_tiny", depth=2, pos_embed_resize="official", **options)


@pytest.mark.parametrize("size", [384, 512])
@torch.no_grad()
def test_shvit_starts_larger_with_all_of_its_weights(size: int) -> None:
    source = lightspine.create_model("shvit_s1")
    model = lightspine.create_model("shvit_s1", checkpoint=source.state_dict()).eval()
    assert not model.load_report.missing
    maps = model.forward_intermediates(torch.randn(1, 3, size, size), intermediates_only=True)
    assert [m.shape[2] for m in maps] == [size // 16, size // 32, size // 64]
