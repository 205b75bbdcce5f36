"""Conversion of a task to the true precision of a run: 64-true, bf16-true or 16-true."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision


def convert_to_true_precision(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Convert a module to float64, bfloat16 or float16 as Lightning does, but before checkpoints are loaded.

    Lightning converts it after it has copied the weights for an average and has loaded a checkpoint: the copy
    would keep float32, and a checkpoint in float64 would be rounded to float32. Nothing happens for other
    precisions.

    Args:
        trainer: the trainer of the run.
        module: the module, changed in place.
    """
    plugin: Any = trainer.strategy.precision_plugin
    if isinstance(plugin, DoublePrecision | HalfPrecision):
        plugin.convert_module(module)
