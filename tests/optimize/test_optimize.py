"""`lightspine.optimize`: the same numbers from fewer steps."""

import copy

import pytest
import torch
from torch import nn

import lightspine
from lightspine.blocks import EfficientViMBlock, VimMixer
from lightspine.errors import UsageError
from lightspine.heads import FeatureBackbone, build_detector, build_segmenter
from support.dense import create_features
from support.exporting import FAMILIES, disturb, registered_models, small_model
from support.reference import relative_l2

# Float32 sums in another order.
TOLERANCE = 5e-6


@pytest.mark.parametrize("name", registered_models())
@torch.inference_mode()
def test_copy_of_a_registered_model_gives_the_same_logits(name):
    model = disturb(lightspine.create_model(name))
    optimized = lightspine.optimize(model)
    for size in ((1, 3, 224, 224), (2, 3, 97, 161)):
        images = torch.randn(size)
        assert relative_l2(optimized(images), model(images)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_features_of_the_copy_are_the_same(family):
    model = small_model(family)
    optimized = lightspine.optimize(model)
    images = torch.randn(2, 3, 64, 96)
    assert relative_l2(optimized.forward_features(images), model.forward_features(images)) < TOLERANCE
    last, maps = optimized.forward_intermediates(images)
    expected_last, expected_maps = model.forward_intermediates(images)
    for actual, expected in zip([last, *maps], [expected_last, *expected_maps], strict=True):
        assert actual.shape == expected.shape
        assert relative_l2(actual, expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_features_only_model_keeps_its_maps(family):
    model = disturb(create_features(family))
    images = torch.randn(1, 3, 64, 96)
    optimized = lightspine.optimize(model)
    assert optimized.feature_info.channels() == model.feature_info.channels()
    for actual, expected in zip(optimized(images), model(images), strict=True):
        assert relative_l2(actual, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["efficientvim", "shvit"])
@torch.inference_mode()
def test_two_distilled_classifiers_become_one(family):
    model = small_model(family, distilled=True)
    optimized = lightspine.optimize(model)
    images = torch.randn(2, 3, 64, 64)
    assert relative_l2(optimized(images), model(images)) < TOLERANCE
    assert not isinstance(optimized.get_classifier(), tuple)


@pytest.mark.parametrize(
    "options",
    [
        {"directions": "v1"},
        {"divide_out": False},
        {"layer_scale": 0.3},
        {"directions": "one-way", "reverse": True},
        {"state_dim": 3, "expand": 1},
    ],
    ids=str,
)
@torch.inference_mode()
def test_every_kind_of_vim_mixer_keeps_its_values(options):
    mixer = disturb(VimMixer(16, **options))
    x = torch.randn(2, 16, 5, 7)
    assert relative_l2(lightspine.optimize(mixer)(x), mixer(x)) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "silu", "out_norm": "dwconv"},
        {"state_dim": 4, "out_act": True},
        {"scan_order": "bidirectional"},
        {"ssm_conv_size": 0, "mlp_ratio": 0.0},
    ],
    ids=str,
)
@torch.inference_mode()
def test_every_kind_of_vmamba_block_keeps_its_values(options):
    model = small_model("vmamba", **options)
    images = torch.randn(1, 3, 64, 64)
    assert relative_l2(lightspine.optimize(model)(images), model(images)) < TOLERANCE


@torch.inference_mode()
def test_efficientvim_block_with_the_other_mixer_keeps_its_values():
    block = disturb(EfficientViMBlock(16, state_dim=5, mixer="nc-ssd", expand=2.0))
    x = torch.randn(2, 16, 5, 7)
    optimized = lightspine.optimize(block)
    for actual, expected in zip(optimized.forward_with_state(x), block.forward_with_state(x), strict=True):
        assert relative_l2(actual, expected) < TOLERANCE


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
@pytest.mark.parametrize("family", ["vim", "shvit"])
@torch.inference_mode()
def test_segmenter_keeps_its_logits(family, head):
    segmenter = disturb(build_segmenter(head, FeatureBackbone(create_features(family)), 4, channels=16))
    images = torch.randn(1, 3, 64, 96)
    assert relative_l2(lightspine.optimize(segmenter)(images), segmenter(images)) < TOLERANCE


@torch.inference_mode()
def test_detector_keeps_its_pyramid():
    detector = disturb(build_detector("retinanet", FeatureBackbone(create_features("shvit")), 3, channels=16))
    images = torch.randn(1, 3, 64, 96)
    optimized = lightspine.optimize(detector)
    for stride, level in detector.backbone(images).items():
        assert relative_l2(optimized.backbone(images)[stride], level) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_original_stays_as_it_is(family):
    model = small_model(family)
    before = copy.deepcopy(model.state_dict())
    lightspine.optimize(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_copy_says_what_the_model_said():
    model = small_model("shvit", num_classes=7)
    optimized = lightspine.optimize(model)
    assert optimized.pretrained_cfg == model.pretrained_cfg
    assert optimized.init_args == model.init_args
    assert (optimized.num_classes, optimized.num_features) == (7, model.num_features)


def test_half_precision_model_stays_in_half_precision():
    model = small_model("shvit").to(torch.bfloat16)
    assert lightspine.optimize(model)(torch.randn(1, 3, 64, 64).bfloat16()).dtype == torch.bfloat16


@torch.inference_mode()
def test_no_batch_norm_is_left():
    names = [
        name
        for family in FAMILIES
        for name, m in lightspine.optimize(small_model(family)).named_modules()
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    assert names == []


def test_model_in_training_is_refused():
    with pytest.raises(UsageError, match=r"evaluation mode .* but the model is training"):
        lightspine.optimize(small_model("shvit").train())


def test_part_in_training_is_refused_by_its_name():
    model = small_model("shvit")
    model.stages[1].train()
    with pytest.raises(UsageError, match=r"but stages\.1 is training"):
        lightspine.optimize(model)


def test_batch_norm_that_cannot_be_folded_is_refused_by_its_name():
    model = nn.ModuleDict({"alone": nn.BatchNorm2d(3)}).eval()
    with pytest.raises(UsageError, match=r"but alone cannot be folded"):
        lightspine.optimize(model)
