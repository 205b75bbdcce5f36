"""CIFAR recipes learn from real images."""

import tarfile
from pathlib import Path

import pytest
import torch

from lightspine.recipes import list_recipes
from lightspine.training.cli import train_recipe
from support.images import shared_archive


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared_archive("cifar10_small.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "cifar10_small"


NAMES = [name for name in list_recipes() if name.startswith("cifar10_")]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # Vim takes 15 minutes of a core
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_gpu")])
def test_two_epochs_on_5000_images_beat_chance_by_far(name: str, cifar: Path, tmp_path: Path) -> None:
    _train(name, cifar, tmp_path, "--trainer.max_epochs=2", "--trainer.accelerator=cpu")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_gpu")])
def test_epochs_on_a_gpu_beat_chance_by_far(name: str, cifar: Path, tmp_path: Path) -> None:
    # As many steps as two epochs with the batch size of the other recipes; so fast must the average follow.
    options = ["--trainer.max_epochs=8", "--trainer.accelerator=gpu", "--model.ema_decay=0.9"]
    _train(name, cifar, tmp_path, *options)


def _train(name: str, cifar: Path, tmp_path: Path, *options: str) -> None:
    overrides = [f"--data.root={cifar}", *options]
    result = train_recipe(name, folder=tmp_path / "run", overrides=overrides, progress=False)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.score > 20  # of ten classes
