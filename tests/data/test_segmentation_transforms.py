"""Segmentation augmentation, as published."""

import colorsys
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.segmentation import (
    PhotometricDistortion,
    RandomDiverseCrop,
    RandomRatioResize,
    create_segmentation_eval_transform,
    create_segmentation_transform,
)
from lightspine.data.transforms import Preprocessing
from lightspine.errors import UsageError


def _sample(height: int, width: int, labels: Tensor | None = None) -> tuple[Any, Any]:
    image = tv_tensors.Image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8))
    if labels is None:
        labels = torch.randint(0, 3, (height, width), dtype=torch.uint8)
    return image, tv_tensors.Mask(labels)


@pytest.mark.parametrize(
    ("size", "expected"), [((512, 683), (512, 683)), ((300, 300), (512, 512)), ((200, 1600), (256, 2048))]
)
def test_ratio_resize_fits_into_the_rectangle(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image, labels = RandomRatioResize(ratio=(1, 1))(*_sample(*size))
    assert image.shape[1:] == labels.shape == expected


def test_ratio_resize_draws_from_half_to_twice() -> None:
    resize = RandomRatioResize((160, 40))
    sides = [resize(*_sample(40, 50))[0].shape[1] for _ in range(60)]
    assert 20 <= min(sides) < 30
    assert 70 < max(sides) <= 80


def test_mixed_crop_avoids_places_of_one_class() -> None:
    labels = torch.zeros(64, 640, dtype=torch.uint8)
    labels[:, 600:] = 1
    labels[:, 300:310] = 255
    sample = _sample(64, 640, labels)
    plain, mixed = RandomDiverseCrop((64, 64), 1.0), RandomDiverseCrop((64, 64))
    found = {
        crop: sum(len({*crop(*sample)[1].unique().tolist()} - {255}) > 1 for _ in range(60))
        for crop in (plain, mixed)
    }
    assert found[mixed] > 3 * found[plain]


def test_mixed_crop_cuts_image_and_labels_alike() -> None:
    labels = torch.arange(64 * 80).reshape(64, 80).remainder(251).to(torch.uint8)
    image, cut = RandomDiverseCrop((32, 100))(
        tv_tensors.Image(labels.expand(3, -1, -1)), tv_tensors.Mask(labels)
    )
    assert image.shape == (3, 32, 80)
    assert torch.equal(image[0].as_subclass(Tensor), cut.as_subclass(Tensor))


def test_training_transform_fills_with_the_mean_and_without_labels() -> None:
    transform = create_segmentation_transform(Preprocessing(), crop=(96, 96), ratio=(1, 1), scale=(40, 40))
    image, labels = transform(*_sample(50, 50))
    assert (image[:, 40:] == 0).all()
    assert (labels[40:] == 255).all()
    assert labels[:40, :40].max() <= 2


def test_eval_transform_normalises_as_the_model_takes_it() -> None:
    image, labels = _sample(40, 50)
    found, kept = create_segmentation_eval_transform(Preprocessing(), scale=None)(image, labels)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (Preprocessing().mean, Preprocessing().std)
    )
    torch.testing.assert_close(found, (image.as_subclass(Tensor).float() / 255 - mean) / std)
    assert torch.equal(kept, labels.as_subclass(Tensor).long())


@pytest.mark.parametrize("twice", [True, False])
def test_images_are_resized_to_multiples_in_one_step_or_two(twice: bool) -> None:
    sample = _sample(75, 101)
    transform = create_segmentation_eval_transform(
        Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)), scale=(40, 96), divisor=32, resize_twice=twice
    )
    # The rectangle gives 40 x 54 pixels; the next multiples are 64 x 64.
    steps = [[40, 54], [64, 64]] if twice else [[64, 64]]
    expected = sample[0]
    for size in steps:
        expected = F.resize(expected, size, antialias=False)
    torch.testing.assert_close(transform(*sample)[0], expected.as_subclass(Tensor).float() / 255)


def _distort(**changes: Any) -> Tensor:
    params = {"brightness": 0, "contrast": 1, "contrast_first": True, "saturation": 1, "hue": 0} | changes
    pixels = torch.tensor([[200, 10, 90], [40, 10, 250], [90, 10, 90]], dtype=torch.uint8).T[:, None]
    return PhotometricDistortion().transform(tv_tensors.Image(pixels), params).as_subclass(Tensor)[:, 0].T


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"brightness": 30}, [230, 40, 120]),
        ({"brightness": -30}, [170, 0, 60]),
        ({"contrast": 1.5}, [255, 15, 135]),
        ({"contrast": 0.5, "contrast_first": False}, [100, 5, 45]),
    ],
)
def test_distortion_adds_or_multiplies(changes: dict[str, Any], first: list[int]) -> None:
    assert _distort(**changes)[0].tolist() == first


@pytest.mark.parametrize("factor", [0.5, 1.04, 1.5])
def test_distortion_multiplies_the_saturation_of_hsv(factor: float) -> None:
    for before, after in zip(_distort().tolist(), _distort(saturation=factor).tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
        assert after == pytest.approx(expected, abs=0.51)


def test_distortion_turns_the_hue() -> None:
    for before, after in zip(_distort().tolist(), _distort(hue=0.1).tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb((hue + 0.1) % 1, saturation, value), abs=2.5)


def test_distortion_leaves_labels_and_changes_most_images() -> None:
    image, labels = _sample(32, 32)
    changed = 0
    for _ in range(30):
        found, kept = PhotometricDistortion()(image, labels)
        assert torch.equal(kept, labels)
        changed += not torch.equal(found, image)
    assert 20 <= changed <= 30


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RandomRatioResize((0, 5)),
        lambda: RandomRatioResize(ratio=(2, 1)),
        lambda: RandomDiverseCrop((0, 5)),
        lambda: RandomDiverseCrop((5, 5), 0),
        lambda: create_segmentation_transform(Preprocessing(), hflip=2),
        lambda: create_segmentation_eval_transform(Preprocessing(), divisor=0),
    ],
)
def test_transform_with_a_value_out_of_range_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        wrong()
