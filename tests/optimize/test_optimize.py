"""`lightspine.optimize`: same outputs with fewer operations."""

import copy

import pytest
import torch
from torch import nn

import lightspine
from lightspine.blocks import EfficientViMBlock, VimMixer
from lightspine.errors import UsageError
from lightspine.heads import FeatureBackbone, build_detector, build_segmenter
from lightspine.optimize.packed import PackedConv2d, PackedLinear
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


class _PreActivation(nn.Module):
    """BatchNorm without a convolution to fold into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.norm(x)))


@torch.inference_mode()
def test_batch_norm_that_cannot_be_folded_stays():
    model, images = disturb(_PreActivation()), torch.randn(2, 3, 8, 8)
    optimized = lightspine.optimize(model)
    assert isinstance(optimized.norm, nn.BatchNorm2d)
    assert relative_l2(optimized(images), model(images)) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_050", "repvgg_a0", "convnext_atto", "levit_128s", "test_vit"],
)
@torch.inference_mode()
def test_timm_model_gives_the_same_logits_without_batch_norms(name):
    model = disturb(lightspine.create_model(name))
    optimized = lightspine.optimize(model)
    size = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, size, size)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in optimized.modules())
    assert any(isinstance(m, PackedLinear | PackedConv2d) for m in optimized.modules())
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = images.contiguous(memory_format=layout)
        assert relative_l2(optimized(inputs), model(inputs)) < TOLERANCE


@torch.inference_mode()
def test_timm_feature_maps_stay_the_same():
    model = disturb(lightspine.create_model("resnet18", features_only=True))
    optimized, images = lightspine.optimize(model), torch.randn(1, 3, 64, 64)
    for actual, expected in zip(optimized(images), model(images), strict=True):
        assert relative_l2(actual, expected) < TOLERANCE


@torch.inference_mode()
def test_result_keeps_its_memory_format():
    model = disturb(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    optimized, images = lightspine.optimize(model), torch.randn(2, 3, 9, 9)
    assert optimized(images).is_contiguous()
    nhwc = images.contiguous(memory_format=torch.channels_last)
    assert optimized(nhwc).is_contiguous(memory_format=torch.channels_last)


class _TwoUses(nn.Module):
    """Uses the output of the convolution twice, or normalizes it only for one value of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.other_conv, self.other_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, skip=None):
        y, z = self.conv(x), self.other_conv(x)
        z = self.other_norm(z if skip is None else z + skip)
        return self.norm(y) + y + z


@torch.inference_mode()
def test_batch_norm_is_folded_only_where_nothing_else_uses_its_input():
    model, x, skip = disturb(_TwoUses()), torch.randn(1, 3, 5, 5), torch.randn(1, 4, 5, 5)
    optimized = lightspine.optimize(model)
    assert relative_l2(optimized(x), model(x)) < TOLERANCE
    assert relative_l2(optimized(x, skip), model(x, skip)) < TOLERANCE


@torch.inference_mode()
def test_shared_layers_stay_as_they_are():
    shared = nn.Conv2d(4, 4, 1)
    model = disturb(nn.Sequential(shared, nn.BatchNorm2d(4), nn.Sequential(shared, nn.BatchNorm2d(4))))
    x = torch.randn(1, 4, 5, 5)
    assert relative_l2(lightspine.optimize(model)(x), model(x)) < TOLERANCE


@torch.inference_mode()
def test_layer_with_a_hook_stays_as_it_is():
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].register_forward_hook(lambda _module, _args, output: output + 1)
    x = torch.randn(1, 3, 5, 5)
    assert relative_l2(lightspine.optimize(model)(x), model(x)) < TOLERANCE


@torch.inference_mode()
def test_layer_with_another_forward_stays_as_it_is():
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU()))
    inner = model[2].forward
    model[2].forward = lambda x: inner(x) + 1
    x = torch.randn(1, 3, 5, 5)
    assert relative_l2(lightspine.optimize(model)(x), model(x)) < TOLERANCE


@torch.inference_mode()
def test_dropout_is_removed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU()).eval()
    optimized = lightspine.optimize(model)
    assert not any(isinstance(m, nn.Dropout) for m in optimized.modules())
    x = torch.randn(2, 3)
    assert torch.equal(optimized(x), model(x))


class LowRankAdapter(nn.Module):
    """LoRA as adapters wrap it: keeps the layer, and adds a low-rank product to its output."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_a_model_stay_in_effect(family: str) -> None:
    model = small_model(family)
    wrapped = 0
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(path, LowRankAdapter(layer).eval())
            wrapped += 1
    assert wrapped
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_l2(lightspine.optimize(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_a_model_are_kept(family: str) -> None:
    model = small_model(family)
    layers = [layer for layer in model.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
    calls: list[None] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(None))
    with torch.inference_mode():
        model(torch.randn(1, 3, 64, 64))
        expected = len(calls)
        calls.clear()
        lightspine.optimize(model)(torch.randn(1, 3, 64, 64))
    assert len(calls) == expected
