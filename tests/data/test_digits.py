"""DigitsDataset: split, image size and augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightspine.data import (
    DigitsDataset,
    Preprocessing,
    create_eval_transform,
    export_digits,
    open_image,
)
from lightspine.data.digits import digits_preprocessing
from lightspine.errors import UsageError


def _pixels(dataset: DigitsDataset) -> list[bytes]:
    return [image.numpy().tobytes() for image in dataset.pixels]


def test_split_holds_out_a_fifth_of_every_digit() -> None:
    train, test = DigitsDataset("train"), DigitsDataset("test")
    assert len(train) + len(test) == 1797
    shares = torch.bincount(test.labels) / (torch.bincount(train.labels) + torch.bincount(test.labels))
    assert torch.allclose(shares, torch.full((10,), 0.2), atol=0.005)


def test_split_is_always_the_same() -> None:
    torch.manual_seed(1)
    first = DigitsDataset("test")
    torch.manual_seed(2)
    assert torch.equal(first.pixels, DigitsDataset("test").pixels)


def test_batch_has_three_channels_of_asked_size() -> None:
    images, labels, bad = DigitsDataset("test", image_size=48).__getitems__([3, 1, 4])
    assert images.shape == (3, 3, 48, 48)
    assert labels.shape == (3,)
    assert bad == []


def test_training_images_are_normalised() -> None:
    dataset = DigitsDataset("train")
    images = dataset.__getitems__(list(range(len(dataset)))).images
    assert images.mean().abs() < 0.05
    assert images.std() == pytest.approx(1, abs=0.1)


def test_augmentation_moves_digits_slightly() -> None:
    plain = DigitsDataset("train").__getitems__(list(range(64))).images
    moved = DigitsDataset("train", augment=True).__getitems__(list(range(64))).images
    difference = (plain - moved).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert difference.min() > 0.01
    # An augmented digit is still closer to its original than to another digit.
    assert difference.mean() < torch.cdist(plain.flatten(1), plain.flatten(1)).mean() / plain[0].norm()


def test_augmentation_repeats_with_seed() -> None:
    dataset = DigitsDataset("train", augment=True)
    torch.manual_seed(5)
    first = dataset.__getitems__([0, 1]).images
    torch.manual_seed(5)
    assert torch.equal(first, dataset.__getitems__([0, 1]).images)


def test_size_below_32_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 32 px, got 28"):
        DigitsDataset("train", image_size=28)


def test_exported_file_gives_the_input_of_the_data_set(tmp_path: Path) -> None:
    files = export_digits(tmp_path, count=10, image_size=64)
    transform = create_eval_transform(digits_preprocessing(64))
    dataset = DigitsDataset("test", image_size=64)
    wanted = dataset.__getitems__([int((dataset.labels == digit).nonzero()[0]) for digit in range(10)]).images
    read = torch.stack([transform(open_image(path)) for path, _ in files])
    assert [name for _, name in files] == [str(digit) for digit in range(10)]
    # Files have 256 gray levels.
    assert (read - wanted).abs().max() <= 0.5 / 255 / 0.324 + 1e-5


def test_preprocessing_survives_a_round_through_json_values() -> None:
    preprocessing = digits_preprocessing(64)
    assert Preprocessing.from_config(preprocessing.to_dict()) == preprocessing
    assert np.prod(preprocessing.input_size) == 3 * 64 * 64
