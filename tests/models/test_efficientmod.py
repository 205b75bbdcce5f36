"""EfficientMod against reference values of the official code."""

import pytest
import torch
from timm.layers import DropPath
from timm.optim import param_groups_weight_decay
from torch import nn

import lightspine
from lightspine.errors import UsageError
from lightspine.models.efficientmod import EfficientMod, checkpoint_filter_fn
from support.family_figures import assert_map, assert_training_step, run_figure
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
    ("efficientMod_xxs", "efficientmod_xxs"),
    pytest.param(("efficientMod_s", "efficientmod_s"), marks=slow),
    pytest.param(("efficientMod_s_Conv", "efficientmod_s_conv"), marks=slow),
]
PARAMETERS = {
    "efficientmod_xxs": 4_736_264,
    "efficientmod_xs": 6_627_544,
    "efficientmod_s": 12_897_184,
    "efficientmod_s_conv": 12_872_336,
}
SMALL = {
    "embed_dims": (8, 16, 24),
    "depths": (2, 1, 1),
    "attention_depths": (0, 0, 1),
    "attention_mlp_ratios": (4.0, 4.0, 2.0),
    "num_classes": 5,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module", params=FIGURES, ids=lambda names: names[1])
def run(request, tmp_path_factory):
    figure_name, model_name = request.param
    return run_figure(f"efficientmod/{figure_name}", model_name, tmp_path_factory.mktemp(model_name))


def test_logits_equal_official_in_float64(run):
    assert_close("logits", run.logits, run.figure["logits"], 1e-7)


@pytest.mark.parametrize("name", ["stem", "stage1", "stage2", "stage3", "stage4"])
def test_map_equals_official_in_float64(run, name):
    assert_map(name, run.maps[name], run.figure["features"][name])


def test_logits_equal_official_in_float32(run, tmp_path):
    model = load_figure_model(run.figure["reference"]["function"].lower(), run.figure, tmp_path)
    with torch.inference_mode():
        assert_close("logits", model(figure_images(run.figure, torch.float32)), run.figure["logits"], 1e-4)


def test_training_step_equals_official(tmp_path):
    figure = read_figure("efficientmod/efficientMod_xxs")
    assert_training_step("efficientmod_xxs", load_figure_model("efficientmod_xxs", figure, tmp_path), figure)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = lightspine.create_model(name)
    assert count(model) == PARAMETERS[name]


def test_own_layout_passes_the_filter_unchanged():
    model = EfficientMod(**SMALL)
    assert list(checkpoint_filter_fn(model.state_dict(), model)) == list(model.state_dict())


def test_model_without_classes_takes_an_official_checkpoint():
    official = fill_checkpoint(read_figure("efficientmod/efficientMod_xxs")["checkpoint"])
    model = lightspine.create_model("efficientmod_xxs", num_classes=0)
    report = lightspine.load_checkpoint(model, official)
    assert len(report.loaded) == len(model.state_dict())
    assert report.dropped == ["head.weight", "head.bias"]


def test_forward_features_are_normalised_and_the_stage_maps_are_not():
    model = EfficientMod(**SMALL).eval()
    images = torch.randn(1, 3, 64, 64)
    last, maps = model.forward_intermediates(images)
    assert torch.equal(last, model.forward_features(images))
    torch.testing.assert_close(last.mean(1), torch.zeros_like(last.mean(1)), atol=1e-6, rtol=0)
    assert not torch.equal(last, maps[-1])


def test_norm_option_normalises_the_last_map_only():
    model = EfficientMod(**SMALL).eval()
    images = torch.randn(1, 3, 64, 64)
    plain = model.forward_intermediates(images, intermediates_only=True)
    normalised = model.forward_intermediates(images, norm=True, intermediates_only=True)
    assert [torch.equal(x, y) for x, y in zip(plain, normalised, strict=True)] == [True, True, False]
    assert torch.equal(normalised[-1], model.forward_features(images))


@pytest.mark.parametrize(("height", "width"), [(97, 161), (225, 250), (33, 47), (32, 32)])
def test_maps_have_promised_strides_at_odd_sizes(height, width):
    model = EfficientMod(**SMALL).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    assert [tuple(x.shape[2:]) for x in maps] == [(-(-height // s), -(-width // s)) for s in (4, 8, 16)]


def test_expand_pattern_starts_anew_in_each_stage():
    with torch.device("meta"):
        model = lightspine.create_model("efficientmod_xs")
    ratios = [[b.mlp.expand_ratio for b in stage.blocks if hasattr(b, "gamma")] for stage in model.stages]
    assert ratios == [[1, 4, 1], [1, 4, 1], [1, 4, 1, 4], [1, 4]]


def test_heads_are_no_narrower_than_32_channels():
    with torch.device("meta"):
        model = lightspine.create_model("efficientmod_s")
    assert [stage.blocks[-1].attn.head_dim for stage in model.stages[2:]] == [32, 39]


def test_linear_layers_start_as_published():
    model = lightspine.create_model("efficientmod_xxs")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = torch.cat([m.weight.flatten() for m in linears])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert not any(m.bias.any() for m in linears if m.bias is not None)


def test_convolutions_keep_the_initialisation_of_pytorch_with_their_biases():
    model = lightspine.create_model("efficientmod_xxs")
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        bound = conv.weight[0].numel() ** -0.5
        assert 0.9 * bound < conv.weight.abs().max() <= bound
        assert 0.5 * bound < conv.bias.abs().max() <= bound


def test_layer_scale_starts_small_and_is_in_modulation_blocks_only():
    model = lightspine.create_model("efficientmod_xxs")
    gammas = [p for name, p in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 2 + 2 + 6 + 2
    assert all((gamma == 1e-4).all() for gamma in gammas)


def test_weight_decay_spares_norms_biases_and_layer_scales():
    model = lightspine.create_model("efficientmod_xxs")
    spared, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in kernels}
    assert len(spared["params"]) + len(kernels) == len(list(model.parameters()))


def test_drop_path_rate_grows_linearly_over_all_blocks():
    model = EfficientMod(drop_path_rate=0.4, **SMALL)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_drop_rate_acts_in_training_only():
    model = EfficientMod(drop_rate=0.5, **SMALL)
    x = torch.rand(2, 24, 3, 3) + 1
    assert (model.train().forward_head(x, pre_logits=True) == 0).any()
    assert torch.equal(model.eval().forward_head(x, pre_logits=True), x.mean((2, 3)))


@pytest.mark.parametrize("option", ["context_f", "context_g"])
def test_ablated_context_map_saves_one_linear_layer_per_modulation_block(option):
    whole, without = EfficientMod(**SMALL), EfficientMod(**SMALL, **{option: False})
    assert count(whole) - count(without) == sum(
        d * (c * c + c) for d, c in zip((2, 1, 1), (8, 16, 24), strict=True)
    )


@pytest.mark.parametrize("options", [{"context_f": False}, {"context_g": False}, {"fusion": "sum"}], ids=str)
def test_ablation_changes_the_output(options):
    whole, ablated = EfficientMod(**SMALL).eval(), EfficientMod(**SMALL, **options).eval()
    for model in (whole, ablated):
        model.load_state_dict(fill_checkpoint({key: list(x.shape) for key, x in model.state_dict().items()}))
    images = torch.randn(1, 3, 64, 64)
    assert relative_l2(ablated(images), whole(images)) > 0.01


def test_sum_instead_of_product_has_as_many_parameters():
    assert count(EfficientMod(**SMALL, fusion="sum")) == count(EfficientMod(**SMALL))


def test_memory_format_of_the_images_does_not_matter():
    model = EfficientMod(**SMALL).eval()
    images = torch.randn(2, 3, 70, 65)
    assert torch.equal(model(images), model(images.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 2)}, "must be equally long, got lengths 3, 2, 3, 3"),
        ({"kernel_size": 4}, "must be odd and positive, got 4"),
        ({"expand_ratios": (0, 6)}, "expand_ratio must be at least 1, got 0"),
        ({"fusion": "max"}, "must be 'product' or 'sum', got 'max'"),
        ({"global_pool": "max"}, "must be 'avg' or '', got 'max'"),
        ({"global_pool": ""}, "needs global_pool='avg', got '' with num_classes=5"),
    ],
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        EfficientMod(**(SMALL | options))


def test_unknown_output_format_is_refused():
    with pytest.raises(UsageError, match="must be 'NCHW', got 'NLC'"):
        EfficientMod(**SMALL).forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")
