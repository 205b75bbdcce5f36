"""Small checkpoints for the tests of evaluation and inference."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightspine
from lightspine.data import Preprocessing
from lightspine.models.saving import save_checkpoint
from support.reference import fill_checkpoint, read_figure
from support.training import SMALL_MODEL


def save_small(
    path: Path, *, classes: list[str] | None = None, model: str = SMALL_MODEL, size: int = 32
) -> Path:
    """Save a network with reproducible random weights."""
    torch.manual_seed(0)
    network = lightspine.create_model(model, num_classes=len(classes) if classes else 1000)
    preprocessing = Preprocessing(input_size=(3, size, size)).to_dict()
    return save_checkpoint(network, path, class_names=classes, preprocessing=preprocessing)


def put_published_shvit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Save filled tensors in the authors' layout where a download of `shvit_s1.in1k` would be cached."""
    cache = folder / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    tensors = fill_checkpoint(read_figure("shvit/shvit_s1")["checkpoint"])
    torch.save({"model": tensors}, cache / "shvit_s1.pth")
    monkeypatch.setenv("TORCH_HOME", str(folder))
    return tensors
