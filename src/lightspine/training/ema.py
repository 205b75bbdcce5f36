"""Exponential moving average (EMA) of the weights.

A checkpoint has the EMA weights in `state_dict` and the raw weights in `current_model_state`. Both are
exported; `export_weights` of the task selects which are validated and saved as `model.safetensors`.
"""

from itertools import chain
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightspine.errors import UsageError
from lightspine.training.precision import convert_to_true_precision

ExportedWeights = Literal["ema", "raw"]


class WeightAverage(EMAWeightAveraging):
    """Lightning's EMA callback that starts from the initial weights, as timm's ModelEma does.

    It has the option to validate and export the raw weights instead.

    Args:
        decay: decay of the average, between 0 and 1.
        export_weights: the weights that are validated and stay in the model at the end of training.
    """

    def __init__(self, decay: float, export_weights: ExportedWeights) -> None:
        super().__init__(decay=decay)
        self.decay = decay
        self.export_weights = export_weights
        # Pairs of lists of tensors, those of the average and of the model.
        self._averaged: tuple[list[Tensor], list[Tensor]] = [], []
        self._copied: tuple[list[Tensor], list[Tensor]] = [], []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the initial weights, in the precision and on the device of the run."""
        if stage == "fit":
            convert_to_true_precision(trainer, pl_module)
            # Lightning moves the module to the device later, and would leave the average on the CPU.
            self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # At 0, torch's AveragedModel would replace the initial weights by those after the first step.
            self._average_model.n_averaged.fill_(1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Collect the tensors of the model and of the average, when the model is on its device."""
        assert self._average_model is not None
        average = self._average_model.module
        pairs = list(
            zip(
                chain(average.parameters(), average.buffers()),
                chain(pl_module.parameters(), pl_module.buffers()),
                strict=True,
            )
        )

        def lists(floating: bool) -> tuple[list[Tensor], list[Tensor]]:
            chosen = [pair for pair in pairs if pair[0].is_floating_point() == floating]
            return [mean.detach() for mean, _ in chosen], [value.detach() for _, value in chosen]

        self._averaged, self._copied = lists(True), lists(False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Update the average after an optimizer step, with a few operations for all tensors.

        `torch.optim.swa_utils.AveragedModel`, which Lightning's callback calls, updates them one by one and
        reads its counter from the device. Integers, such as BatchNorm's counter of batches, are copied.
        """
        if trainer.global_step <= self._latest_update_step:
            return
        torch._foreach_lerp_(*self._averaged, 1 - self.decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap in the averaged weights."""
        if self.export_weights == "ema":
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the trained weights back in."""
        if self.export_weights == "ema":
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the selected weights in the model."""
        if self.export_weights == "ema":
            super().on_train_end(trainer, pl_module)


def ema_callback(decay: float, export_weights: ExportedWeights = "ema") -> WeightAverage:
    """Return the EMA callback: after each step, average = decay * average + (1 - decay) * weights.

    Averages parameters and buffers, starting from the initial weights, as timm's ModelEma does.

    Args:
        decay: decay of the average, between 0 and 1.
        export_weights: the weights that are validated and exported as `model.safetensors`, "ema" or "raw".

    Raises:
        UsageError: `decay` is not between 0 and 1, or `export_weights` is unknown.
    """
    if not 0 < decay < 1:
        raise UsageError(f"expected an EMA decay between 0 and 1, got {decay}")
    if export_weights not in ("ema", "raw"):
        raise UsageError(f"expected export_weights 'ema' or 'raw', got {export_weights!r}")
    return WeightAverage(decay, export_weights)


def averaged_model(trainer: pl.Trainer) -> nn.Module | None:
    """Return the averaged copy of the task's model, or None without EMA or before training starts."""
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]  # unknown to its types
    for callback in callbacks:
        if isinstance(callback, WeightAverage) and callback._average_model is not None:
            # The average covers the whole LightningModule. Lightning 2.6 has no public access to it.
            average: Any = callback._average_model.module
            return cast(nn.Module, average.model)
    return None
