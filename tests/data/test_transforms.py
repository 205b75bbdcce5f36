"""Transforms: sizes, published settings and the augmentation presets."""

import pytest
import torch
from PIL import Image

import lightspine
from lightspine.data import AUGMENTATIONS, Preprocessing, create_eval_transform, create_train_transform
from lightspine.errors import UsageError

IMAGE = Image.effect_noise((90, 70), 60).convert("RGB")


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_train_transform_gives_size_of_preprocessing(augmentation: str) -> None:
    transform = create_train_transform(Preprocessing(input_size=(3, 48, 48)), augmentation)
    assert transform(IMAGE).shape == (3, 48, 48)


def test_train_transform_without_augmentation_is_deterministic() -> None:
    transform = create_train_transform(Preprocessing(input_size=(3, 48, 48)), "none")
    assert torch.equal(transform(IMAGE), transform(IMAGE))


def test_train_transform_refuses_unknown_augmentation() -> None:
    with pytest.raises(UsageError, match="none, light, medium, strong, got 'wild'"):
        create_train_transform(Preprocessing(), "wild")


def test_eval_transform_normalises_by_mean_and_std() -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    transform = create_eval_transform(Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3))
    assert torch.allclose(transform(grey), torch.full((3, 32, 32), (128 / 255 - 0.5) / 0.25), atol=1e-6)


def test_preprocessing_takes_settings_of_the_model() -> None:
    model = lightspine.create_model("efficientvim_m1")
    preprocessing = Preprocessing.from_config(model.pretrained_cfg, image_size=96)
    assert preprocessing.input_size == (3, 96, 96)
    assert preprocessing.crop_pct == model.pretrained_cfg["crop_pct"]


def test_transform_refuses_other_channel_counts() -> None:
    with pytest.raises(UsageError, match="3 channels, but the model takes 5"):
        create_eval_transform(Preprocessing(input_size=(5, 32, 32)))
