"""A checkpoint of other classes, another model or another split is refused with a sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightspine.data.modules import ImageFolderDataModule
from lightspine.errors import UsageError
from lightspine.models.checkpoint import CKPT_METADATA
from lightspine.training.classification import ClassificationTask
from lightspine.training.resume_check import check_resumed
from support.images import write_folder
from support.run_files import train_classifier
from support.training import SMALL_MODEL


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data `data` and the run `run`."""
    folder = tmp_path_factory.mktemp("resumed")
    train_classifier(folder / "data", folder / "run")
    return folder


def _data(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, **{"image_size": 48, "val_fraction": 0.4, "seed": 3} | options)


def _check(trained: Path, data: ImageFolderDataModule, model: str = SMALL_MODEL, **options: Any) -> None:
    task = ClassificationTask(model, data.num_classes, **options)
    check_resumed(trained / "run" / "last.ckpt", task, data)


def test_the_same_run_is_resumed(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    _check(trained, _data(trained / "data"))
    assert not caplog.messages


def test_renamed_class_is_named(trained: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, count=5)
    (tmp_path / "blue").rename(tmp_path / "azure")
    with pytest.raises(UsageError, match="class 0 is 'blue' there and 'azure' in the data"):
        _check(trained, _data(tmp_path))


def test_another_number_of_classes_is_told(trained: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, count=5)
    (tmp_path / "red").rename(tmp_path.parent / f"{tmp_path.name}_red")
    with pytest.raises(UsageError, match=r"expected the 3 classes of the resumed run .* got 2"):
        _check(trained, _data(tmp_path))


def test_another_model_is_named(trained: Path) -> None:
    message = "expected a checkpoint of test_vit to resume from, but .* is of test_resnet"
    with pytest.raises(UsageError, match=message):
        _check(trained, _data(trained / "data"), model="test_vit", model_args={"img_size": 48})


def test_another_split_of_the_same_images_is_refused(trained: Path) -> None:
    message = r"\(val_fraction 0.4, seed 3\), got val_fraction 0.4 and seed 4: images that it was trained on"
    with pytest.raises(UsageError, match=message):
        _check(trained, _data(trained / "data", seed=4))


def test_other_images_and_sizes_are_warned_about(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, count=6)
    _check(trained, _data(tmp_path, image_size=64))
    images, size = caplog.messages
    assert images.startswith("the images are not those of the resumed run")
    assert size.endswith("image size or settings [3, 48, 48], this one has [3, 64, 64]")


def test_tensors_of_another_shape_are_named(trained: Path, tmp_path: Path) -> None:
    # As a checkpoint of an earlier version, which does not tell its classes.
    stored = torch.load(trained / "run" / "last.ckpt", weights_only=True)
    del stored[CKPT_METADATA]
    torch.save(stored, tmp_path / "old.ckpt")
    task = ClassificationTask(SMALL_MODEL, 4)
    message = re.escape("fc.weight is 3x96 in the file and 4x96 in the model")
    with pytest.raises(UsageError, match=f"2 tensors differ: model.{message}"):
        check_resumed(tmp_path / "old.ckpt", task, _data(trained / "data"))
