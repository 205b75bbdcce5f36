from pathlib import Path

import pytest
import torch
from torch import nn

import lightspine
from lightspine.errors import UsageError
from lightspine.heads import FeatureBackbone
from support.dense import MEMBERS, create_features, small_backbone


@pytest.mark.parametrize("member", MEMBERS)
def test_maps_have_the_promised_widths_and_strides(member):
    backbone = small_backbone(member).eval()
    maps = backbone(torch.rand(1, 3, 97, 161))
    assert len(maps) == len(backbone.channels) == len(backbone.strides)
    for x, width, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert x.shape[1] == width
        for side, pixels in zip(x.shape[2:], (97, 161), strict=True):
            assert pixels // stride <= side <= -(-pixels // stride)


@pytest.mark.parametrize("member", ["vmamba", "efficientvim"])
def test_layer_norm_is_of_each_map_and_not_of_what_follows(member):
    features = create_features(member).eval()
    normed = FeatureBackbone(features, norm="layer").eval()(torch.ones(1, 3, 64, 96))
    for raw, x in zip(features(torch.ones(1, 3, 64, 96)), normed, strict=True):
        expected = nn.functional.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2], eps=1e-5)
        torch.testing.assert_close(x, expected.permute(0, 3, 1, 2))


def test_frozen_stages_get_no_gradient_and_the_others_do():
    backbone = small_backbone("shvit", frozen_stages=1)
    sum(x.square().sum() for x in backbone(torch.rand(2, 3, 64, 64))).backward()
    frozen = {name for name, p in backbone.named_parameters() if p.grad is None}
    expected = {
        name
        for name, _ in backbone.named_parameters()
        if name.startswith(("model.model.stem", "model.model.stages.0."))
    }
    assert expected
    assert frozen == expected


def test_frozen_stem_keeps_its_batch_norm_statistics():
    backbone = small_backbone("shvit", frozen_stages=0).train()
    before = {name: x.clone() for name, x in backbone.named_buffers()}
    backbone(torch.rand(2, 3, 64, 64))
    changed = {name for name, x in backbone.named_buffers() if not torch.equal(x, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith("model.model.stem")]


@pytest.mark.parametrize("member", ["shvit", "efficientvim", "timm"])
def test_frozen_batch_norm_keeps_its_statistics_and_learns(member):
    backbone = small_backbone(member, freeze_batch_norm=True).eval().train()
    before = {name: x.clone() for name, x in backbone.named_buffers()}
    sum(x.square().sum() for x in backbone(torch.rand(2, 3, 64, 64))).backward()
    assert before
    assert all(torch.equal(x, before[name]) for name, x in backbone.named_buffers())
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight.grad is not None for norm in norms)


@pytest.mark.parametrize("member", ["vmamba", "vim", "efficientvim", "shvit", "efficientmod"])
def test_checkpoint_of_the_classifier_loads_with_a_report(member, tmp_path: Path):
    name, sizes = MEMBERS[member]
    classifier = lightspine.create_model(name, **sizes).eval()
    path = tmp_path / "classifier.pth"
    torch.save({"model": classifier.state_dict()}, path)
    backbone = FeatureBackbone(
        lightspine.create_model(name, features_only=True, checkpoint=path, **sizes)
    ).eval()
    assert str(backbone.load_report).startswith("loaded ")
    images = torch.rand(1, 3, 64, 64)
    expected = classifier.forward_intermediates(images, intermediates_only=True)[-1]
    torch.testing.assert_close(backbone(images)[-1], expected)


def test_kept_maps_lose_their_neighbours_norms():
    backbone = small_backbone("vmamba", norm="layer")
    whole = backbone(torch.ones(1, 3, 64, 64))
    backbone.keep_maps([1, 3])
    assert backbone.strides == (8, 32)
    for x, expected in zip(backbone(torch.ones(1, 3, 64, 64)), (whole[1], whole[3]), strict=True):
        torch.testing.assert_close(x, expected)
    assert sum(p.numel() for p in backbone.norms.parameters()) == 2 * (32 + 128)


def test_classifier_is_refused():
    with pytest.raises(UsageError, match="created with features_only=True, got a SHViT"):
        FeatureBackbone(lightspine.create_model("shvit_s1"))


def test_more_frozen_stages_than_there_are_is_refused():
    with pytest.raises(UsageError, match="frozen_stages must be 0 to 3, got 4"):
        small_backbone("shvit", frozen_stages=4)


def test_freezing_a_model_without_stages_names_the_way_out():
    with pytest.raises(UsageError, match="feature_cls='getter'"):
        small_backbone("timm", frozen_stages=0)
    features = create_features("timm", feature_cls="getter")
    assert not FeatureBackbone(features, frozen_stages=0).model.model.conv_stem.weight.requires_grad
