"""The exponential average of the weights, kept by a callback during training.

A checkpoint holds the averaged weights as `state_dict` and the trained ones beside them. Both are exported;
which of the two the validation scores, and `model.safetensors` holds, is up to the recipe.
"""

from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightspine.errors import UsageError

ExportedWeights = Literal["ema", "raw"]


class WeightAverage(EMAWeightAveraging):
    """Lightning's average; where the trained weights are the published ones, it only looks on.

    Args:
        decay: between 0 and 1.
        export_weights: the weights that are validated, and stay in the network when training ends.
    """

    def __init__(self, decay: float, export_weights: ExportedWeights) -> None:
        super().__init__(decay=decay)
        self.export_weights = export_weights

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place of the trained weights."""
        if self.export_weights == "ema":
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the trained weights back."""
        if self.export_weights == "ema":
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the published weights in the network."""
        if self.export_weights == "ema":
            super().on_train_end(trainer, pl_module)


def ema_callback(decay: float, export_weights: ExportedWeights = "ema") -> WeightAverage:
    """Return the callback: after step n the average is decay * average + (1 - decay) * weights.

    Parameters and buffers are averaged, as by timm's ModelEma. The average begins with the weights after the
    first step.

    Args:
        decay: between 0 and 1.
        export_weights: the weights that are validated and exported as `model.safetensors`, "ema" or "raw".

    Raises:
        UsageError: a decay that is not above 0 and below 1, or an unknown `export_weights`.
    """
    if not 0 < decay < 1:
        raise UsageError(f"expected an EMA decay between 0 and 1, got {decay}")
    if export_weights not in ("ema", "raw"):
        raise UsageError(f"expected export_weights 'ema' or 'raw', got {export_weights!r}")
    return WeightAverage(decay, export_weights)


def averaged_model(trainer: pl.Trainer) -> nn.Module | None:
    """Return the averaged copy of the task's network, or None without an average."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]  # unknown to its types
    for callback in callbacks:
        if isinstance(callback, WeightAverage) and callback._average_model is not None:
            # The average is one of the whole task. Lightning 2.6 has no public way to it.
            average: Any = callback._average_model.module
            return cast(nn.Module, average.model)
    return None
