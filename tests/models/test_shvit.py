"""SHViT against reference values of the official code and timm's model."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from torch import nn

import lightspine
from lightspine.errors import UsageError
from lightspine.models.shvit import SHViT, checkpoint_filter_fn
from support.family_figures import assert_map, assert_training_step, run_figure
from support.fill import fill_tensor
from support.reference import (
    assert_close,
    figure_images,
    fill_checkpoint,
    load_figure_model,
    read_figure,
    relative_l2,
)

slow = pytest.mark.slow
FIGURES = [
    "shvit_s1",
    "shvit_s1_dist",
    pytest.param("shvit_s2", marks=slow),
    pytest.param("shvit_s4", marks=slow),
]
PARAMETERS = {
    "shvit_s1": 6_330_808,
    "shvit_s1_dist": 6_652_448,
    "shvit_s2": 11_483_072,
    "shvit_s2_dist": 11_932_968,
    "shvit_s3": 14_245_273,
    "shvit_s3_dist": 14_695_169,
    "shvit_s4": 16_588_484,
    "shvit_s4_dist": 17_038_380,
}
SMALL = {"embed_dims": (16, 28, 42), "depths": (1, 2, 1), "partial_dims": (None, 6, 9), "num_classes": 5}


@pytest.fixture(scope="module", params=FIGURES)
def run(request, tmp_path_factory):
    return run_figure(f"shvit/{request.param}", request.param, tmp_path_factory.mktemp(request.param))


def test_logits_equal_official_in_float64(run):
    assert_close("logits", run.logits, run.figure["logits"], 1e-7)


@pytest.mark.parametrize("name", ["stem", "stage1", "stage2", "stage3"])
def test_map_equals_official_in_float64(run, name):
    assert_map(name, run.maps[name], run.figure["features"][name])


def test_logits_equal_official_in_float32(run, tmp_path):
    name = run.figure["reference"]["function"] + "_dist" * run.model.distilled
    model = load_figure_model(name, run.figure, tmp_path)
    with torch.inference_mode():
        assert_close("logits", model(figure_images(run.figure, torch.float32)), run.figure["logits"], 1e-4)


def test_training_step_equals_official(tmp_path):
    figure = read_figure("shvit/shvit_s1")
    assert_training_step("shvit_s1", load_figure_model("shvit_s1", figure, tmp_path), figure)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = lightspine.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["shvit_s1", *(pytest.param(f"shvit_s{i}", marks=slow) for i in (2, 3, 4))])
def test_timm_checkpoint_gives_timm_logits(name):
    theirs = timm.create_model(name).double().eval()
    filled = {
        key: torch.from_numpy(fill_tensor(key, tuple(x.shape), 0.9)) for key, x in theirs.state_dict().items()
    }
    theirs.load_state_dict(filled)
    ours = lightspine.create_model(name).double().eval()
    lightspine.load_checkpoint(ours, filled)
    images = torch.randn(2, 3, 97, 161, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_l2(ours(images), theirs(images)) < 1e-12


def test_timm_keeps_its_own_models_and_gains_the_distilled_ones():
    assert not isinstance(timm.create_model("shvit_s1"), SHViT)
    assert isinstance(timm.create_model("shvit_s1_dist"), SHViT)


def test_own_layout_passes_the_filter_unchanged():
    model = SHViT(distilled=True, **SMALL)
    assert list(checkpoint_filter_fn(model.state_dict(), model)) == list(model.state_dict())


def test_plain_model_takes_a_distilled_checkpoint_without_its_second_head():
    figure = read_figure("shvit/shvit_s1_dist")
    official = fill_checkpoint(figure["checkpoint"], figure["gain"])
    model = lightspine.create_model("shvit_s1")
    report = lightspine.load_checkpoint(model, official)
    assert {key.split(".")[0] for key in report.dropped} == {"head_dist"}
    assert torch.equal(model.head.fc.weight, official["head.l.weight"])


def test_model_without_classes_takes_an_official_checkpoint():
    official = fill_checkpoint(read_figure("shvit/shvit_s1")["checkpoint"])
    model = lightspine.create_model("shvit_s1", num_classes=0)
    report = lightspine.load_checkpoint(model, official)
    assert len(report.loaded) == len(model.state_dict())


def test_distilled_model_gives_two_outputs_in_training_and_their_mean_in_evaluation():
    model = SHViT(distilled=True, **SMALL)
    x = torch.randn(2, 42, 2, 2)
    model.head.eval(), model.head_dist.eval()
    logits, logits_dist = model.forward_head(x)
    assert not torch.equal(logits, logits_dist)
    torch.testing.assert_close(model.eval().forward_head(x), (logits + logits_dist) / 2)


def test_reset_classifier_of_a_distilled_model_renews_both_heads():
    model = SHViT(distilled=True, **SMALL).eval()
    model.reset_classifier(9)
    assert [head.out_features for head in model.get_classifier()] == [9, 9]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 9)


@pytest.mark.parametrize(("height", "width"), [(97, 161), (225, 250), (33, 47), (32, 32)])
def test_maps_have_promised_strides_at_odd_sizes(height, width):
    model = SHViT(**SMALL).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    sizes = [(-(-height // s), -(-width // s)) for s in (16, 32, 64)]
    assert [tuple(x.shape[2:]) for x in maps] == sizes


def test_residual_branches_start_as_published():
    model = lightspine.create_model("shvit_s1")
    silent, loud = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.weight.unique().numel() == 1
            (loud if module.weight[0] else silent).add(name)
    ends = ("dwconv.norm", "pw2.norm", "proj.norm")
    merging = ("pre.dwconv.norm", "post.dwconv.norm")
    assert silent == {n for n in silent | loud if n.endswith(ends) and not n.endswith(merging)}


def test_classifier_starts_as_published():
    fc = lightspine.create_model("shvit_s1").head.fc
    assert fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not fc.bias.any()


def test_weight_decay_spares_norms_and_biases():
    model = lightspine.create_model("shvit_s1_dist")
    spared, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in kernels}
    assert len(spared["params"]) + len(kernels) == len(list(model.parameters()))


def test_drop_path_rate_grows_linearly_over_the_blocks():
    model = SHViT(drop_path_rate=0.3, **SMALL)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_drop_rate_acts_in_training_only():
    model = SHViT(drop_rate=0.5, **SMALL)
    x = torch.rand(2, 42, 2, 2) + 1
    dropped = model.train().forward_head(x, pre_logits=True)
    assert (dropped == 0).any()
    assert torch.equal(model.eval().forward_head(x, pre_logits=True), x.mean((2, 3)))


def test_memory_format_of_the_images_does_not_matter():
    model = SHViT(**SMALL).eval()
    images = torch.randn(2, 3, 70, 65)
    assert torch.equal(model(images), model(images.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2)}, "must be equally long, got lengths 3, 2 and 3"),
        ({"embed_dims": (20, 28, 42)}, "must be a multiple of 8, got 20"),
        ({"partial_dims": (None, 6, 43)}, "between 1 and dim=42, got 43"),
        ({"global_pool": "max"}, "must be 'avg' or '', got 'max'"),
        ({"global_pool": ""}, "needs global_pool='avg', got '' with num_classes=5"),
    ],
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SHViT(**(SMALL | options))


def test_unknown_output_format_is_refused():
    with pytest.raises(UsageError, match="must be 'NCHW', got 'NLC'"):
        SHViT(**SMALL).forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")
