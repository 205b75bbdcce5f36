"""Classification transforms: sizes, published settings and augmentation presets."""

import numpy as np
import pytest
import torch
from PIL import Image

import lightspine
import lightspine_runtime
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
    with pytest.raises(UsageError, match="3 input channels, as images are RGB, got 5"):
        create_eval_transform(Preprocessing(input_size=(5, 32, 32)))


def _published_eval(image: Image.Image, size: int) -> torch.Tensor:
    """Resize the shorter side to int(256 / 224 * size), bicubic, then center crop."""
    shorter = int(256 / 224 * size)
    width, height = image.size
    scaled = (
        (shorter, int(shorter * height / width))
        if width < height
        else (int(shorter * width / height), shorter)
    )
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    return _normalised(image.crop((left, top, left + size, top + size)))


def _normalised(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    return (pixels - torch.tensor((0.485, 0.456, 0.406))[:, None, None]) / torch.tensor(
        (0.229, 0.224, 0.225)
    )[:, None, None]


@pytest.mark.parametrize("size", [192, 224, 256, 384])
@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (640, 427)])
def test_eval_transform_crops_by_published_rule(size: int, shape: tuple[int, int]) -> None:
    image = Image.effect_noise(shape, 60).convert("RGB")
    transform = create_eval_transform(Preprocessing(input_size=(3, size, size), crop_pct=0.875))
    assert torch.allclose(transform(image), _published_eval(image, size), atol=1e-6)


@pytest.mark.parametrize("size", [384, 512])
def test_squashing_eval_transform_resizes_without_crop(size: int) -> None:
    image = Image.effect_noise((500, 375), 60).convert("RGB")
    preprocessing = Preprocessing(input_size=(3, size, size), crop_pct=1.0, crop_mode="squash")
    wanted = _normalised(image.resize((size, size), Image.Resampling.BICUBIC))
    assert torch.allclose(create_eval_transform(preprocessing)(image), wanted, atol=1e-6)


def test_long_image_is_refused_before_it_is_resized() -> None:
    long = Image.new("RGB", (32, 2_000_000))
    with pytest.raises(UsageError, match="usual proportions, got 32x2000000 px"):
        create_eval_transform(Preprocessing())(long)
    runtime = lightspine_runtime.preprocessing
    settings = runtime.Preprocessing.from_mapping(Preprocessing().to_dict(), "a file")
    with pytest.raises(lightspine_runtime.UsageError, match="usual proportions, got 32x2000000 px"):
        runtime.resize_and_crop(long, settings)
