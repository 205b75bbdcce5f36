"""Short training runs on the digits with a small network."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lightspine
from lightspine.data.modules import DigitsDataModule
from lightspine.training.classification import ClassificationTask
from lightspine.training.fit import TrainResult, train

# A small timm ResNet of 470 thousand parameters: these tests are about training, not the model.
SMALL_MODEL = "test_resnet"


def make_trainer(folder: Path, **options: Any) -> pl.Trainer:
    """Return a plain Lightning trainer for one epoch on the CPU that writes and prints nothing."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )


def make_task(**options: Any) -> ClassificationTask:
    """Return a classification task for the digits."""
    return ClassificationTask(**{"model": SMALL_MODEL, "num_classes": 10, "warmup_epochs": 0.2} | options)


def run(
    folder: Path, *, task: ClassificationTask | None = None, epochs: int = 2, **options: Any
) -> TrainResult:
    """Train on six batches of the digits per epoch, validated on two."""
    return train(
        task or make_task(),
        DigitsDataModule(batch_size=32),
        # The weights of the last epoch tell whether two runs are the same to the end.
        **{"folder": folder, "epochs": epochs, "accelerator": "cpu", "progress": False, "export": "last"}
        | {"limit_train_batches": 6, "limit_val_batches": 2}
        | options,
    )


def same_weights(first: Path, second: Path) -> bool:
    """Compare the tensors of two exported models bit for bit."""
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the `state_dict` of a `.ckpt` file."""
    return torch.load(path, weights_only=True)["state_dict"]


def make_loaded_model(name: str, **options: Any) -> nn.Module:
    """Return a model that was loaded from a checkpoint with random weights."""
    sizes = {key: value for key, value in options.items() if key == "depth"}
    weights = lightspine.create_model(name, **sizes).state_dict()
    return lightspine.create_model(name, checkpoint=weights, **options)
