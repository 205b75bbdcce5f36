"""CIFAR recipes learn from real images."""

import tarfile
from pathlib import Path

import pytest

from lightspine.recipes import list_recipes
from lightspine.training.cli import train_recipe
from support.images import shared_archive


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared_archive("cifar10_small.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "cifar10_small"


@pytest.mark.slow
@pytest.mark.timeout(3600)  # Vim takes 15 minutes of a core
@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("cifar10_")])
def test_two_epochs_on_5000_images_beat_chance_by_far(name: str, cifar: Path, tmp_path: Path) -> None:
    overrides = [f"--data.root={cifar}", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    result = train_recipe(name, folder=tmp_path / "run", overrides=overrides, progress=False)
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"]
    assert result.score > 20  # of ten classes
