"""Weights of wrapped models, in the containers that training code and other libraries write."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine_cli.main import main

OPTIONS = {"embed_dims": (8, 8, 16), "depths": (1, 1, 1), "partial_dims": (None, 4, 4), "num_classes": 5}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return build().state_dict()


def build() -> nn.Module:
    return lightspine.create_model("shvit_s1", **OPTIONS)


def assert_loads(content, weights: dict[str, Tensor]) -> list[str]:
    """Load into a new model and return the names that were left out."""
    model = build()
    report = lightspine.load_checkpoint(model, content)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    return report.dropped


@pytest.mark.parametrize(
    "prefix",
    [
        "net.",
        "backbone.",
        "encoder.",
        "student.",
        "ema_model.",
        "model._orig_mod.",
        "_orig_mod.model.module.",
        "model.net.backbone.",
    ],
)
def test_any_nesting_of_wrappers_is_taken_off(weights, prefix):
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    assert assert_loads({"state_dict": wrapped}, weights) == []


def test_tensors_beside_the_wrapped_model_are_left_out_and_named(weights):
    wrapped = {f"model.{name}": tensor for name, tensor in weights.items()}
    wrapped |= {"criterion.weight": torch.ones(5), "n_averaged": torch.tensor(3)}
    wrapped |= {f"teacher.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    dropped = assert_loads(wrapped, weights)
    assert {"criterion.weight", "n_averaged", "teacher.stem.0.conv.weight"} <= set(dropped)


def test_wrapped_layers_are_found(weights):
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in weights.items()}
    assert wrapped.keys() != weights.keys()
    assert assert_loads(wrapped, weights) == []


@pytest.mark.parametrize("entry", ["model_state_dict", "net", "params", "ema_state_dict"])
def test_names_of_other_training_code_are_known(weights, entry):
    assert_loads({entry: weights, "optimizer": {}}, weights)


def test_sharded_file_is_read_by_its_index(weights, tmp_path):
    names = list(weights)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}})
    )
    assert_loads(index, weights)


def test_index_cannot_lead_out_of_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(LightspineError, match="expected files in its own folder"):
        lightspine.load_checkpoint(build(), index)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_program_in_place_of_weights_is_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(LightspineError, match="is a TorchScript program: expected weights"):
        lightspine.load_checkpoint(build(), path)


def test_nan_in_the_weights_is_refused(weights):
    broken = {name: tensor.clone() for name, tensor in weights.items()}
    broken["head.fc.weight"][0, 0] = float("nan")
    with pytest.raises(LightspineError, match=r"NaN or infinity in 1 weights, .* head\.fc\.weight"):
        lightspine.load_checkpoint(build(), broken)


def test_message_shows_the_unexpected_name_beside_the_missing_one(weights):
    renamed = {name.replace("stem.", "root."): tensor for name, tensor in weights.items()}
    with pytest.raises(LightspineError, match=r"missing in the file; root\.\S+ is not in the model"):
        lightspine.load_checkpoint(build(), renamed)


def test_info_says_that_a_file_with_own_classes_fits(tmp_path, capsys):
    path = lightspine.save_checkpoint(build(), tmp_path / "own.safetensors", class_names=list("abcde"))
    assert main(["info", str(path)]) == 0
    assert "all tensors" in capsys.readouterr().out


def test_prefix_selects_the_model_of_timm(tmp_path):
    model = lightspine.create_model("timm/shvit_s1", num_classes=3)
    assert type(model).__module__ == "timm.models.shvit"
    loaded, metadata = lightspine.load_model(
        lightspine.save_checkpoint(model, tmp_path / "theirs.safetensors"), device="cpu"
    )
    assert type(loaded) is type(model)
    assert metadata.name == "timm/shvit_s1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 384}, "has no argument 'img_size': it takes images of any size"),
        ({"output_stride": 8}, "has no argument 'output_stride': stem_stride gives finer maps"),
        ({"checkpoint_path": "x.pth"}, "expected checkpoint=PATH"),
        ({"no_such": 1}, "has no argument 'no_such': expected some of depths, "),
    ],
)
def test_arguments_of_other_models_are_explained(arguments, message):
    with pytest.raises(UsageError, match=message):
        lightspine.create_model("shvit_s1", **arguments)


def test_profile_takes_a_checkpoint_file(tmp_path, capsys):
    path = lightspine.save_checkpoint(
        build(), tmp_path / "own.safetensors", preprocessing={"input_size": [3, 64, 64]}
    )
    assert main(["profile", str(path), "--repeats", "1", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["size"] == [64, 64]
