"""Grad-CAM against finite differences; valid classes and stages."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightspine
from lightspine.analysis import cam, open_model
from lightspine.errors import UsageError
from support.images import write_image


class Toy(nn.Module):
    """Two convolutions and a classifier, with the attributes of a timm model."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Tanh())
        self.tail = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)
        self.feature_info = [{"num_chs": 4, "reduction": 8, "module": "body"}]

    def rest(self, features: Tensor) -> Tensor:
        return self.head(self.tail(features).sigmoid().mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.body(x))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "a.png", (9, 99, 200), size=(48, 40))


def finite_differences(toy: Toy, features: Tensor, target: int, step: float = 1e-4) -> Tensor:
    gradient = torch.zeros_like(features)
    for place in np.ndindex(*features.shape):
        moved = features.clone()
        moved[place] += step
        higher = toy.rest(moved)[0, target]
        moved[place] -= 2 * step
        gradient[place] = (higher - toy.rest(moved)[0, target]) / (2 * step)
    return gradient


@pytest.mark.parametrize("target", [None, 0, 2])
def test_grad_cam_equals_finite_differences(image: Path, target: int | None) -> None:
    toy = Toy()
    (result,) = cam(open_model(toy, size=(32, 40)), [image], target=target)
    wide = Toy().double()
    wide.load_state_dict({key: value.double() for key, value in toy.state_dict().items()})
    with torch.no_grad():
        features = wide.body(result.image.pixels.double())
        number = int(wide.rest(features).argmax()) if target is None else target
        gradient = finite_differences(wide, features, number)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()[0]
    np.testing.assert_allclose(result.cams[0], expected, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(result.activations[0], features[0].norm(dim=0), rtol=1e-5)
    assert result.class_name == str(number)


def test_likeliest_class_is_explained_with_its_probability(image: Path) -> None:
    toy = Toy()
    (result,) = cam(open_model(toy, size=32), [image])
    with torch.no_grad():
        expected = toy(result.image.pixels)[0].softmax(0).max()
    assert result.probability == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "name",
    ["vmamba_tiny", "efficientvim_m1", "shvit_s1", "efficientmod_xxs", "resnet10t", "vit_tiny_patch16_224"],
)
def test_every_kind_of_model_has_maps_of_its_stages(name: str, image: Path) -> None:
    small = {"vmamba_tiny": {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 32, 64]}}
    model = lightspine.create_model(name, num_classes=7, **small.get(name, {}))
    fixed = name.startswith("vit")
    (result,) = cam(open_model(model, size=None if fixed else (70, 97)), [image], target=5)
    assert len(result.cams) in (3, 4, 5)
    for cam_map, activation in zip(result.cams, result.activations, strict=True):
        assert cam_map.shape == activation.shape
        assert (cam_map >= 0).all()
        assert (activation > 0).any()


@pytest.fixture(scope="module")
def vim() -> nn.Module:
    return lightspine.create_model("vim_tiny", depth=3, dim=32, num_classes=4)


def test_patches_that_the_class_token_no_longer_reads_are_left_out(vim: nn.Module, image: Path) -> None:
    (result,) = cam(open_model(vim, size=(64, 80)), [image])
    assert result.modules == ["blocks.0", "blocks.1"]
    assert result.cams[0].shape == (4, 5)


def test_stage_that_the_class_does_not_depend_on_is_refused(vim: nn.Module, image: Path) -> None:
    with pytest.raises(UsageError, match=r"does not depend on the map of blocks\.2 .* earlier stage"):
        cam(open_model(vim, size=64), [image], stage=2)


def test_missing_stage_is_refused_with_those_there_are(vim: nn.Module, image: Path) -> None:
    with pytest.raises(UsageError, match="expected a stage among 0, 1, 2, got 9"):
        cam(open_model(vim, size=64), [image], stage=9)


def test_unknown_class_is_refused_with_those_there_are(vim: nn.Module, image: Path) -> None:
    with pytest.raises(UsageError, match="expected a class among 0, 1, 2, 3, got 'rose'"):
        cam(open_model(vim, size=64), [image], target="rose")


def test_class_is_found_by_the_beginning_of_its_name(image: Path) -> None:
    model = lightspine.create_model("shvit_s1")
    (result,) = cam(open_model(model, size=64), [image], target="tench", stage=2)
    assert result.class_name.startswith("tench")


def test_network_without_classifier_is_refused(image: Path) -> None:
    model = lightspine.create_model("shvit_s1", num_classes=0, global_pool="")
    with pytest.raises(UsageError, match="expected a classifier, got a model whose output is not"):
        cam(open_model(model, size=64), [image])
