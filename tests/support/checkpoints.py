"""Small checkpoints for the tests of evaluation and inference."""

from pathlib import Path

import torch

import lightspine
from lightspine.data import Preprocessing
from lightspine.models.checkpoint import save_checkpoint
from support.training import SMALL_MODEL


def save_small(
    path: Path, *, classes: list[str] | None = None, model: str = SMALL_MODEL, size: int = 32
) -> Path:
    """Save a network with reproducible random weights."""
    torch.manual_seed(0)
    network = lightspine.create_model(model, num_classes=len(classes) if classes else 1000)
    preprocessing = Preprocessing(input_size=(3, size, size)).to_dict()
    return save_checkpoint(network, path, class_names=classes, preprocessing=preprocessing)
