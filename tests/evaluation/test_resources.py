"""Loader workers that are killed, and memory that is not enough, end a run with a sentence."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from lightspine.data.dataset import ImageDataset
from lightspine.errors import LightspineError
from lightspine.evaluation import InferenceOptions, evaluate, predict_images
from support.checkpoints import save_small
from support.images import COLOURS, write_folder
from support.run_files import train_classifier


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resources")
    save_small(folder / "colours.safetensors", classes=list(COLOURS))
    write_folder(folder / "images", count=6)
    return folder


def _evaluate(place: Path, out: Path) -> None:  # noqa: ARG001
    evaluate(place / "colours.safetensors", place / "images", batch_size=2, num_workers=1)


def _predict(place: Path, out: Path) -> None:
    options = InferenceOptions(batch_size=2, num_workers=1)
    predict_images(place / "colours.safetensors", place / "images", out / "predictions", options=options)


def _train(place: Path, out: Path) -> None:
    train_classifier(place / "images", out / "run", num_workers=1)


RUNS = pytest.mark.parametrize("run", [_evaluate, _predict, _train], ids=["evaluate", "predict", "train"])


# PyTorch raises the death at any place in the main thread, for example while it opens a file.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@RUNS
def test_killed_worker_ends_the_run(
    run: Callable[[Path, Path], None], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ImageDataset.read

    def die(self: Any, position: int) -> Image.Image:
        if get_worker_info() is not None and position == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, position)

    monkeypatch.setattr(ImageDataset, "read", die)
    with pytest.raises(LightspineError, match=r"a data loader worker \(process \d+\) was killed or crashed"):
        run(place, tmp_path)


@RUNS
def test_lack_of_memory_ends_the_run(
    run: Callable[[Path, Path], None], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Any, position: int) -> Image.Image:  # noqa: ARG001
        return torch.empty(2**60)

    monkeypatch.setattr(ImageDataset, "read", fill)
    with pytest.raises(LightspineError, match=r"not enough memory to allocate .*: a smaller batch"):
        run(place, tmp_path)
