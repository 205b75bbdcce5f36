"""Training augmentation: every setting, against the published recipes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter

from lightspine.data import AUGMENTATIONS, Augmentation, Preprocessing, create_train_transform
from lightspine.data.transforms import create_batch_transform, posterize
from lightspine.errors import UsageError
from lightspine.utils.seeding import seed_generators

PLAIN = Augmentation(
    scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0, auto_augment=None, color_jitter=0, erasing=0
)
SMALL = Preprocessing(input_size=(3, 64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
RAMP = Image.fromarray(np.arange(64, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2) * 3)


def _steps(augmentation: Augmentation) -> dict[str, object]:
    transform = create_train_transform(Preprocessing(), augmentation)
    return {type(step).__name__: step for step in transform.transforms}


def test_defaults_are_the_published_randaugment() -> None:
    step = _steps(Augmentation())["RandAugment"]
    assert step.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in step.ops} == {(9, 0.5, 0.5)}
    names = {op.name for op in step.ops}
    assert {"PosterizeIncreasing", "SolarizeIncreasing", "ColorIncreasing", "SharpnessIncreasing"} <= names
    assert len(step.ops) == 15


def test_defaults_erase_one_rectangle_of_noise_in_a_quarter_of_the_images() -> None:
    step = _steps(Augmentation())["RandomErasing"]
    assert (step.probability, step.per_pixel, step.min_count, step.max_count) == (0.25, True, 1, 1)


def test_defaults_crop_as_published() -> None:
    step = _steps(Augmentation())["RandomResizedCropAndInterpolation"]
    assert (step.scale, step.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert step.interpolation.value == "bicubic"


def test_random_interpolation_draws_bilinear_or_bicubic() -> None:
    step = _steps(Augmentation(interpolation="random"))["RandomResizedCropAndInterpolation"]
    assert {mode.value for mode in step.interpolation} == {"bilinear", "bicubic"}


def test_colour_jitter_is_unused_beside_randaugment() -> None:
    assert "ColorJitter" not in _steps(Augmentation(color_jitter=0.4))


def test_colour_jitter_is_used_without_a_policy() -> None:
    step = _steps(Augmentation(auto_augment=None, color_jitter=0.4))["ColorJitter"]
    assert isinstance(step, ColorJitter)
    assert (step.brightness, step.contrast, step.saturation, step.hue) == ((0.6, 1.4),) * 3 + (None,)


def test_three_augment_draws_solarise_grey_or_blur_before_colour_jitter() -> None:
    steps = _steps(Augmentation(auto_augment="3a", color_jitter=0.3))
    names = [[(op.name, op.prob) for op in choice] for choice in steps["AutoAugment"].policy]
    assert names == [[("Solarize", 1.0)], [("Desaturate", 1.0)], [("GaussianBlurRand", 1.0)]]
    assert list(steps).index("AutoAugment") + 1 == list(steps).index("ColorJitter")


def test_plain_settings_leave_an_image_of_the_input_size_alone() -> None:
    image = create_train_transform(SMALL, PLAIN)(RAMP)
    assert torch.equal(image, torch.from_numpy(np.asarray(RAMP).copy()).permute(2, 0, 1) / 255)


def test_certain_flip_mirrors() -> None:
    plain, flipped = (
        create_train_transform(SMALL, augmentation)(RAMP)
        for augmentation in (PLAIN, Augmentation(**vars(PLAIN) | {"hflip": 1.0}))
    )
    assert torch.equal(flipped, plain.flip(-1))


def test_padded_crop_shifts_by_at_most_an_eighth() -> None:
    transform = create_train_transform(SMALL, Augmentation(**vars(PLAIN) | {"crop": "padded"}))
    shifts = set()
    for seed in range(40):
        seed_generators(seed)
        image = transform(RAMP)
        assert image.shape == (3, 64, 64)
        # A row outside the black border shows the shift of the ramp.
        shifts.add(round(float(image[0, 32, 32]) * 255 / 3) - 32)
    assert min(shifts) >= -8
    assert max(shifts) <= 8
    assert len(shifts) > 8


def test_augmented_image_repeats_with_the_generators() -> None:
    transform = create_train_transform(SMALL, Augmentation())
    images = []
    for seed in (1, 1, 2):
        seed_generators(seed)
        images.append(transform(RAMP))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_posterising_to_no_bits_gives_black() -> None:
    (operation,) = (
        op for op in _steps(Augmentation())["RandAugment"].ops if op.name == "PosterizeIncreasing"
    )
    operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0.0
    assert operation(RAMP).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_posterising_keeps_the_highest_bits(bits: int) -> None:
    assert np.array_equal(np.asarray(posterize(RAMP, bits)), np.asarray(RAMP) & (0xFF << (8 - bits) & 0xFF))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-mstd1-inc1", "augmix-m10", "v0", "3a"])
def test_policy_survives_many_draws(policy: str) -> None:
    transform = create_train_transform(SMALL, Augmentation(auto_augment=policy))
    for seed in range(300):
        seed_generators(seed)
        assert transform(RAMP).isfinite().all()


def test_names_of_presets_stay() -> None:
    assert AUGMENTATIONS == ("none", "light", "medium", "strong")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (0.5, 0.2)}, "crop scale from 0 to 1"),
        ({"scale": (0.0, 1.0)}, "crop scale from 0 to 1"),
        ({"ratio": (0.0, 1.0)}, "crop ratio above 0"),
        ({"hflip": 1.5}, "hflip from 0 to 1, got 1.5"),
        ({"erasing": -0.1}, "erasing from 0 to 1, got -0.1"),
        ({"erasing_count": 0}, "erasing_count of at least 1"),
        ({"color_jitter": -1.0}, "color_jitter of at least 0"),
        ({"auto_augment": "random-m9"}, "policy of timm.* got 'random-m9'"),
        ({"auto_augment": "rand-m9-xyz"}, "policy of timm.* got 'rand-m9-xyz'"),
    ],
)
def test_value_out_of_range_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_train_transform(SMALL, Augmentation(**fields))


def test_images_are_normalized_and_erased_after_mixing_if_set() -> None:
    augmentation = Augmentation(erasing=0.0, erasing_after_mixing=True)
    preprocessing = Preprocessing(input_size=(3, 64, 64))
    seed_generators(1)
    image = create_train_transform(preprocessing, augmentation)(RAMP)
    seed_generators(1)
    usual = create_train_transform(preprocessing, Augmentation(erasing=0.0))(RAMP)
    finish = create_batch_transform(preprocessing, augmentation)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(finish(image[None])[0], usual)


def test_mixed_images_are_erased_with_the_probability_of_the_recipe() -> None:
    torch.manual_seed(0)
    finish = create_batch_transform(SMALL, Augmentation(erasing_after_mixing=True))
    images = finish(torch.zeros(400, 3, 16, 16, dtype=torch.uint8))
    erased = images.flatten(1).any(1)
    assert erased.float().mean().item() == pytest.approx(0.25, abs=0.07)
    # Noise of full strength, on at most a third of the image.
    noise = images[images != 0]
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert (images[:, 0] != 0).flatten(1).float().mean(1).max() < 0.5


def test_batches_are_normalized_by_the_transform_unless_set() -> None:
    assert create_batch_transform(SMALL, Augmentation()) is None
    assert create_batch_transform(SMALL, "strong") is None
