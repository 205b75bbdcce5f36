"""A run ends with a validation, wherever it ends."""

from typing import Any

import lightning.pytorch as pl


class LastValidation(pl.Callback):
    """Validates at the end of a run of so many steps and of one that validates every few epochs only.

    Lightning leaves the end of such a run without scores: nothing would be known of the exported weights.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Let the last epoch have a validation."""
        if trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Let the last step end the run as an early stop does: behind a validation."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True
