"""The same training on fewer devices or with less memory: accumulation, recomputation, compilation."""

import logging

import lightning.pytorch as pl
from torch import nn

from lightspine.errors import UsageError

_log = logging.getLogger(__name__)


class EffectiveBatch(pl.Callback):
    """Accumulates gradients over as many batches as make up the batch size that a recipe was written for.

    The batches of an epoch are cut to whole steps, so that every step has the effective batch and an epoch
    has as many steps as on the recipe's devices.

    Args:
        size: images per step of the optimiser, over all devices.

    Raises:
        UsageError: below 1; when training begins: not a multiple of devices x batch size, fewer images than
            that, or an accumulation set by hand beside it.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UsageError(f"expected an effective batch of at least 1, got {size}")
        self.size = size

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Set the trainer's accumulation."""
        if trainer.accumulate_grad_batches != 1:
            raise UsageError(
                "expected either effective_batch or accumulate_grad_batches, got both "
                f"({self.size} and {trainer.accumulate_grad_batches})"
            )
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]  # unknown to its types
        at_once = loader.batch_size * trainer.world_size
        devices = "1 device" if trainer.world_size == 1 else f"{trainer.world_size} devices"
        if self.size % at_once:
            raise UsageError(
                f"expected an effective batch that is a multiple of {devices} x {loader.batch_size} images "
                f"= {at_once}, got {self.size}"
            )
        steps = self.size // at_once
        limit = trainer.limit_train_batches
        batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
        if batches < steps:
            raise UsageError(
                f"expected at least {self.size} images for one step of the effective batch, "
                f"got {batches * at_once}"
            )
        trainer.accumulate_grad_batches = steps
        trainer.limit_train_batches = batches // steps * steps
        _log.info(
            "effective batch %d = %s x %d images x %d accumulated batches; %d steps per epoch",
            self.size,
            devices,
            loader.batch_size,
            steps,
            batches // steps,
        )


def set_grad_checkpointing(model: nn.Module) -> None:
    """Let a model recompute its activations in the backward pass, which takes time and saves memory.

    Raises:
        UsageError: the model cannot.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise UsageError(f"expected a model with gradient checkpointing, got {type(model).__name__}")
    try:
        switch(True)
    # timm's way to say that a model cannot.
    except AssertionError as error:
        raise UsageError(
            f"expected a model with gradient checkpointing, got {type(model).__name__}"
        ) from error
