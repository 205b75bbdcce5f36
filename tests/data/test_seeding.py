"""SeededDataset: augmentation depends only on seed, epoch, index and repeat."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightspine.data import (
    ImageFolderDataset,
    Preprocessing,
    SeededDataset,
    collate_images,
    create_train_transform,
    list_images,
)
from lightspine.utils.seeding import preserved_generators, seed_generators
from support.images import write_folder


@pytest.fixture
def images(tmp_path: Path) -> SeededDataset:
    samples = list_images(write_folder(tmp_path, count=5))[1]
    transform = create_train_transform(Preprocessing(input_size=(3, 32, 32)), "strong")
    return SeededDataset(ImageFolderDataset(samples, transform, replace_bad=True), seed=3)


def _epoch(images: SeededDataset, num_workers: int, batch_size: int, start: int = 0) -> torch.Tensor:
    order = np.random.default_rng(0).permutation(len(images)).tolist()[start:]
    loader = DataLoader(images, batch_size, sampler=order, num_workers=num_workers, collate_fn=collate_images)
    return torch.cat([batch.images for batch in loader])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_epoch_is_identical_for_any_number_of_workers(images: SeededDataset, num_workers: int) -> None:
    assert torch.equal(_epoch(images, num_workers, 4), _epoch(images, 0, 4))


def test_epoch_is_identical_for_any_batch_size(images: SeededDataset) -> None:
    assert torch.equal(_epoch(images, 0, 3), _epoch(images, 0, 5))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_continues_alike_from_the_middle(images: SeededDataset, num_workers: int) -> None:
    torch.manual_seed(99)  # what a resumed process happens to have drawn
    assert torch.equal(_epoch(images, num_workers, 4, start=8), _epoch(images, 0, 4)[8:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_epoch_augments_anew(images: SeededDataset, num_workers: int) -> None:
    first = _epoch(images, num_workers, 4)
    images.set_epoch(1)
    assert not any(torch.equal(a, b) for a, b in zip(first, _epoch(images, num_workers, 4), strict=True))


def test_repeats_of_an_image_are_augmented_differently(images: SeededDataset) -> None:
    looks = [images[(2, repeat)].image for repeat in range(3)]
    assert not torch.equal(looks[0], looks[1])
    assert not torch.equal(looks[1], looks[2])
    assert torch.equal(looks[0], images[2].image)


def test_seed_of_the_run_changes_the_augmentation(images: SeededDataset) -> None:
    assert not torch.equal(images[0].image, SeededDataset(images.dataset, seed=4)[0].image)


def test_reading_leaves_the_generators_as_they_were(images: SeededDataset) -> None:
    seed = 11
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    _ = images[4]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_generators_come_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserved_generators():
        torch.rand(1 // 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_with_equal_sums_are_unrelated() -> None:
    drawn = set()
    for key in [(0, 1, 2, 0), (1, 0, 2, 0), (0, 2, 1, 0), (0, 0, 3, 0)]:
        seed_generators(*key)
        drawn.add((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert len(drawn) == 4
