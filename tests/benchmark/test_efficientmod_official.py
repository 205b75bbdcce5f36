"""EfficientMod with the official order of operations computes the same values."""

import pytest
import torch

import lightspine
from lightspine.benchmark.efficientmod_official import OfficialEfficientMod
from lightspine.errors import UsageError
from support.exporting import disturb, small_model
from support.reference import relative_l2


@pytest.mark.parametrize("name", ["efficientmod_xxs", "efficientmod_s_conv"])
@torch.inference_mode()
def test_official_order_gives_the_logits_of_our_model(name):
    model = disturb(lightspine.create_model(name, num_classes=10))
    images = torch.randn(2, 3, 97, 64)
    assert relative_l2(OfficialEfficientMod(model)(images), model(images)) < 5e-6


def test_official_order_of_another_family_is_refused():
    with pytest.raises(UsageError, match="expected an EfficientMod with a classifier, got SHViT"):
        OfficialEfficientMod(small_model("shvit"))


def test_official_order_of_an_ablation_is_refused():
    with pytest.raises(UsageError, match="expected fusion='product', as published, got 'sum'"):
        OfficialEfficientMod(small_model("efficientmod", fusion="sum"))
