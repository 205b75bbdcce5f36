"""Loading official, timm and lightspine checkpoints, and errors for unsupported files."""

import argparse
import json
import pickle
import random
import sys
import types
from pathlib import Path

import pytest
import timm
import torch

import lightspine
from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import read_checkpoint
from support.exporting import small_model
from support.reference import fill_checkpoint, read_figure, write_official_file


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    """State dict of shvit_s1 with the published keys."""
    figure = read_figure("shvit/shvit_s1")
    return fill_checkpoint(figure["checkpoint"], figure["gain"])


def test_official_file_loads_every_tensor(official, tmp_path):
    path = write_official_file(tmp_path / "shvit_s1.pth", official)
    model = lightspine.create_model("shvit_s1", checkpoint=path)
    assert len(model.load_report.loaded) == len(model.state_dict()) == len(official)
    assert model.load_report.dropped == model.load_report.missing == []
    assert "renamed from patch_embed.0.c.weight" in model.load_report.converted.values()


@pytest.mark.parametrize("entry", ["model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off(official, entry, prefix):
    model = lightspine.create_model("shvit_s1")
    wrapped = {entry: {prefix + key: value for key, value in official.items()}, "epoch": 3}
    report = lightspine.load_checkpoint(model, wrapped)
    assert report.entry == entry
    assert len(report.loaded) == len(official)


def test_bare_state_dict_loads(official):
    report = lightspine.load_checkpoint(lightspine.create_model("shvit_s1"), official)
    assert (report.entry, report.is_ema) == ("", False)


@pytest.mark.parametrize(
    ("weights", "is_ema"), [("auto", False), ("model", False), ("ema", True)], ids=["auto", "model", "ema"]
)
def test_weights_selects_the_entry(official, weights, is_ema):
    averaged = {key: value + 1 for key, value in official.items()}
    model = lightspine.create_model("shvit_s1")
    report = lightspine.load_checkpoint(model, {"model": official, "model_ema": averaged}, weights=weights)
    assert report.is_ema is is_ema
    expected = averaged if is_ema else official
    assert torch.equal(model.state_dict()["head.fc.weight"], expected["head.l.weight"])


def test_auto_takes_the_average_where_its_score_is_published():
    figure = read_figure("efficientvim/EfficientViM_M1")
    plain = fill_checkpoint(figure["checkpoint"], figure["gain"])
    content = {"model": plain, "model_ema": {key: value.clone() for key, value in plain.items()}}
    report = lightspine.load_checkpoint(lightspine.create_model("efficientvim_m1"), content)
    assert report.entry == "model_ema"


def test_asking_for_an_average_that_is_not_there_is_an_error(official):
    with pytest.raises(UsageError, match="has no 'ema' weights: it holds 'model'"):
        lightspine.load_checkpoint(lightspine.create_model("shvit_s1"), {"model": official}, weights="ema")


def test_head_of_another_size_is_dropped_when_asked_for(official, tmp_path):
    path = write_official_file(tmp_path / "official.pth", official)
    model = lightspine.create_model("shvit_s1", checkpoint=path, num_classes=7)
    assert model.load_report.dropped == ["head.fc.weight", "head.fc.bias"]
    assert model.load_report.missing == ["head.fc.weight", "head.fc.bias"]


def test_head_of_another_size_is_an_error_when_not_asked_for(official):
    small = official | {"head.l.weight": torch.zeros(7, 320), "head.l.bias": torch.zeros(7)}
    with pytest.raises(
        LightspineError, match="a head of 7 classes and the model one of 1000: pass num_classes=7"
    ):
        lightspine.load_checkpoint(lightspine.create_model("shvit_s1"), small)


@pytest.mark.parametrize("in_chans", [1, 5])
def test_first_convolution_is_adapted(official, in_chans):
    model = lightspine.create_model("shvit_s1", checkpoint=official, in_chans=in_chans).eval()
    full = lightspine.create_model("shvit_s1", checkpoint=official).eval()
    grey = torch.randn(1, 1, 64, 64)
    # timm repeats the filters and keeps their sum over channels for a grey image.
    expected = full(grey.expand(-1, 3, -1, -1)) if in_chans == 1 else None
    out = model(grey.expand(-1, in_chans, -1, -1))
    assert torch.isfinite(out).all()
    if expected is not None:
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [3, 1])
def test_backbone_gets_the_weights_of_the_whole_model(official, channels):
    options = {"checkpoint": official, "in_chans": channels}
    backbone = lightspine.create_model("shvit_s1", features_only=True, out_indices=(0, 1), **options)
    whole = lightspine.create_model("shvit_s1", **options).eval()
    images = torch.randn(1, channels, 64, 64)
    expected = whole.forward_intermediates(images, intermediates_only=True)[:2]
    for actual, wanted in zip(backbone.eval()(images), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_timm_backbone_gets_the_weights_of_the_whole_model(tmp_path):
    whole = lightspine.create_model("resnet18").eval()
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "timm.pth")
    backbone = lightspine.create_model(
        "resnet18", checkpoint=tmp_path / "timm.pth", features_only=True
    ).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone(images)[-1], whole.forward_features(images))


def test_another_variant_is_named(official):
    with pytest.raises(
        LightspineError, match=r"is a checkpoint of shvit_s1, expected shvit_s2: .*; .* and \d+ more"
    ):
        lightspine.load_checkpoint(lightspine.create_model("shvit_s2"), official)


def test_another_family_is_named(official):
    with pytest.raises(LightspineError, match="is a checkpoint of shvit_s1, expected efficientvim_m1"):
        lightspine.load_checkpoint(lightspine.create_model("efficientvim_m1"), official)


@pytest.mark.parametrize(
    ("family", "key", "shape"),
    [
        ("shvit", "stem.0.conv.weight", (7,)),
        ("shvit", "head.fc.weight", ()),
        ("efficientvim", "stages.0.blocks.0.mixer.D", (0,)),
        ("vim", "pos_embed", (3,)),
        ("vmamba", "stem.conv1.weight", ()),
    ],
)
def test_tensor_of_another_rank_is_named(family, key, shape):
    model = small_model(family)
    tensors = model.state_dict()
    assert key in tensors
    found = "x".join(map(str, shape)) or "a scalar"
    with pytest.raises(LightspineError, match=f"{key} is {found} in the file"):
        lightspine.load_checkpoint(model, tensors | {key: torch.ones(shape)})


@pytest.mark.parametrize("key", ["layers.0.blocks.0.op.dt_projs_weight", "layers.0.blocks.0.op.A_logs"])
def test_official_tensor_that_cannot_be_converted_is_refused(key):
    tensors = fill_checkpoint(read_figure("vmamba/vmambav2v_tiny")["checkpoint"])
    assert key in tensors
    with pytest.raises(LightspineError, match="does not fit vmamba_tiny: its tensors have unexpected shapes"):
        lightspine.load_checkpoint(
            lightspine.create_model("vmamba_tiny"), tensors | {key: torch.ones(3, 5, 7)[0]}
        )


def test_refused_checkpoint_leaves_the_model_unchanged(official):
    model = lightspine.create_model("shvit_s2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(LightspineError):
        lightspine.load_checkpoint(model, official)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_missing_tensor_is_an_error(official):
    incomplete = {key: value for key, value in official.items() if key != "blocks2.1.se.fc1.weight"}
    with pytest.raises(LightspineError, match="is missing in the file"):
        lightspine.load_checkpoint(lightspine.create_model("shvit_s1"), incomplete)


def test_timm_file_loads(tmp_path):
    theirs = timm.create_model("shvit_s1").eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = lightspine.create_model("shvit_s1", checkpoint=tmp_path / "timm.pth").eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_any_timm_model_loads_its_own_file(tmp_path):
    model = lightspine.create_model("test_vit")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "timm.pth")
    again = lightspine.create_model("test_vit", checkpoint=tmp_path / "timm.pth")
    assert len(again.load_report.loaded) == len(model.state_dict())


def test_own_file_builds_its_model(tmp_path):
    model = lightspine.create_model("shvit_s1", num_classes=3, in_chans=1).eval()
    path = lightspine.save_checkpoint(model, tmp_path / "mine.safetensors", class_names=["a", "b", "c"])
    again, saved = lightspine.load_model(path)
    images = torch.randn(2, 1, 40, 64)
    assert torch.equal(again(images), model(images))
    assert saved.class_names == ["a", "b", "c"]
    assert saved.preprocessing["input_size"][1:] == (224, 224) or saved.preprocessing["input_size"][1:] == [
        224,
        224,
    ]


@pytest.mark.parametrize("name", ["shvit_s1", "test_resnet"])
def test_own_file_builds_a_model_with_a_new_classifier(tmp_path, name):
    model = lightspine.create_model(name)
    model.reset_classifier(3)
    model.eval()
    again, saved = lightspine.load_model(lightspine.save_checkpoint(model, tmp_path / "mine.safetensors"))
    assert saved.kwargs == {"num_classes": 3}
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), model(images))


def test_model_with_replaced_layers_is_not_saved(tmp_path):
    optimized = lightspine.optimize(lightspine.create_model("shvit_s1").eval())
    with pytest.raises(UsageError, match=r"differ, such as .*save the model before"):
        lightspine.save_checkpoint(optimized, tmp_path / "changed.safetensors")
    assert not list(tmp_path.iterdir())


def test_compiled_model_is_saved_like_the_model(tmp_path):
    model = torch.compile(lightspine.create_model("shvit_s1", num_classes=3))
    again, _ = lightspine.load_model(lightspine.save_checkpoint(model, tmp_path / "mine.safetensors"))
    assert torch.equal(again.state_dict()["head.fc.weight"], model.state_dict()["_orig_mod.head.fc.weight"])


def test_official_file_builds_its_model_from_the_tensors_alone(official, tmp_path):
    changed = official | {"head.l.weight": torch.zeros(7, 320), "head.l.bias": torch.zeros(7)}
    model, saved = lightspine.load_model(write_official_file(tmp_path / "unknown.pth", changed))
    assert (saved.name, saved.kwargs) == ("shvit_s1", {"num_classes": 7})
    assert model.num_classes == 7


def test_convert_writes_a_file_that_gives_equal_predictions(official, tmp_path):
    source = write_official_file(tmp_path / "official.pth", official)
    lightspine.convert_checkpoint(source, tmp_path / "ours.safetensors")
    converted, _ = lightspine.load_model(tmp_path / "ours.safetensors")
    direct = lightspine.create_model("shvit_s1", checkpoint=source).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(converted(images), direct(images))


def test_own_file_has_the_permissions_of_any_new_file(tmp_path):
    path = lightspine.save_checkpoint(lightspine.create_model("test_vit"), tmp_path / "mine.safetensors")
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_save_to_another_suffix_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        lightspine.save_checkpoint(lightspine.create_model("shvit_s1"), tmp_path / "model.pth")


def test_namespace_in_an_official_file_is_accepted(official, tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"model": official, "args": argparse.Namespace(model="shvit_s1", lr=0.004)}, path)
    assert read_checkpoint(path).entries.keys() == {"model"}


def test_cfgnode_in_an_official_file_is_accepted(official, tmp_path, monkeypatch):
    """Pickled with a stand-in for yacs' CfgNode, read without yacs."""

    class CfgNode(dict):
        pass

    module = types.ModuleType("yacs.config")
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    config = CfgNode(MODEL=CfgNode(NAME="vmamba"))
    config.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": official, "config": config}, tmp_path / "official.pth")
    assert len(read_checkpoint(tmp_path / "official.pth").entries["model"]) == len(official)


class _Exploit:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malicious_pickle_is_refused_and_does_not_run(official, tmp_path, legacy):
    victim = tmp_path / "it_ran"
    content = {"model": official, "args": _Exploit(victim)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(LightspineError, match=r"is rejected: it contains .*no code was run"):
        lightspine.create_model("shvit_s1", checkpoint=tmp_path / "evil.pth")
    assert not victim.exists()


def test_malicious_plain_pickle_is_refused_and_does_not_run(tmp_path):
    victim = tmp_path / "it_ran"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": _Exploit(victim)}))
    with pytest.raises(LightspineError):
        read_checkpoint(tmp_path / "evil.pth")
    assert not victim.exists()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(10_000)}}, path)
    path.write_bytes(path.read_bytes()[:5_000])


def _noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def _text(path: Path) -> None:
    path.write_text("this is not a checkpoint\n" * 10)


def _truncated_safetensors(path: Path) -> None:
    lightspine.save_checkpoint(lightspine.create_model("test_vit"), path.with_suffix(".safetensors"))
    path.write_bytes(path.with_suffix(".safetensors").read_bytes()[:2_000])


def _no_weights(path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, path)


def _a_list(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


@pytest.mark.parametrize(
    "write", [_empty, _truncated, _noise, _text, _truncated_safetensors, _no_weights, _a_list]
)
def test_damaged_file_is_one_sentence(tmp_path, write):
    path = tmp_path / "damaged.pth"
    write(path)
    with pytest.raises(LightspineError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "damaged.pth" in message
    assert "\n" not in message


def test_missing_file_is_wrong_use(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint file"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_unknown_name_gives_the_closest():
    with pytest.raises(UsageError, match=r"unknown model 'vmamba_tny'; the closest names are vmamba_tiny"):
        lightspine.create_model("vmamba_tny")


def test_report_is_plain_json(official):
    report = lightspine.load_checkpoint(lightspine.create_model("shvit_s1"), official)
    assert json.loads(json.dumps(report.as_dict()))["loaded"] == len(official)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_damage_escapes_as_another_error(tmp_path, legacy):
    """A file truncated or altered anywhere loads or raises a LightspineError."""
    path = tmp_path / "damaged.pth"
    content = {"model": {f"w{i}": torch.ones(5, 7) for i in range(4)}, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    whole, rng = path.read_bytes(), random.Random(0)
    for trial in range(200):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[rng.randrange(1, len(whole)) :]
        else:
            for _ in range(rng.randrange(1, 6)):
                damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        assert "\n" not in _reason_of_refusal(path)


def _reason_of_refusal(path: Path) -> str:
    try:
        read_checkpoint(path)
    except LightspineError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning")
def test_file_with_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"head.weight": torch.ones(2).to_sparse()}}, tmp_path / "odd.pth")
    with pytest.raises(LightspineError, match=r"expected dense tensors .* head\.weight is"):
        read_checkpoint(tmp_path / "odd.pth")


def test_entry_of_trained_weights_that_is_no_dictionary_is_left_out(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "current_model_state": 7}, tmp_path / "odd.pth")
    assert list(read_checkpoint(tmp_path / "odd.pth").entries) == ["state_dict"]


def test_safetensors_file_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(LightspineError, match="damaged"):
        read_checkpoint(tmp_path / "short.safetensors")


def test_file_in_place_of_a_name_is_said(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        UsageError, match=r"expected the name of a model, received the file .*model\.safetensors"
    ):
        lightspine.create_model(str(tmp_path / "model.safetensors"))
