"""The data modules: order of the images and wrong arguments."""

from pathlib import Path

import pytest
import torch

from lightspine.data.modules import DigitsDataModule, ImageFolderDataModule
from lightspine.errors import UsageError
from support.images import write_folder


def _labels(data: DigitsDataModule, epoch: int) -> list[int]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([labels for _, labels, _ in loader]).tolist()


def test_order_repeats_with_seed_and_changes_with_epoch() -> None:
    first = _labels(DigitsDataModule(seed=1, augment=False), epoch=0)
    assert first == _labels(DigitsDataModule(seed=1, augment=False), epoch=0)
    assert first != _labels(DigitsDataModule(seed=1, augment=False), epoch=1)
    assert first != _labels(DigitsDataModule(seed=2, augment=False), epoch=0)


def test_last_incomplete_batch_is_left_out_of_training_only() -> None:
    data = DigitsDataModule(batch_size=64)
    assert {len(labels) for _, labels, _ in data.train_dataloader()} == {64}
    assert sum(len(labels) for _, labels, _ in data.val_dataloader()) == 359


def test_fewer_images_than_a_batch_make_one_batch(tmp_path: Path) -> None:
    data = ImageFolderDataModule(write_folder(tmp_path, count=2), image_size=32, batch_size=64, num_workers=0)
    assert [len(batch.labels) for batch in data.train_dataloader()] == [3]


def test_image_size_below_32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 32 px, got 16"):
        ImageFolderDataModule(write_folder(tmp_path, count=2), image_size=16)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="batch size of at least 1, got 0"):
        DigitsDataModule(batch_size=0)
