"""What every task does alike: optimiser and schedule, clipping, randomness, and steps that go wrong."""

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn

from lightspine.data.bad_images import BadImage, BadImageLog
from lightspine.data.modules import ImageDataModule
from lightspine.errors import UsageError
from lightspine.models.factory import create_model
from lightspine.training.ema import ExportedWeights, averaged_model, ema_callback
from lightspine.training.finetuning import freeze_stages, hold_frozen
from lightspine.training.lr_schedules import CosineSchedule, DecaySchedule, MilestoneSchedule, warmup_cosine
from lightspine.training.nonfinite import NonFiniteGuard
from lightspine.training.optim import OptimizerName, create_optimizer, lr_scheduler_config
from lightspine.utils.seeding import seed_generators

_log = logging.getLogger(__name__)


class LightspineTask(pl.LightningModule):
    """A network in training. A task derives from it and says what the loss and the score are.

    Args:
        optimizer: made by timm; see `create_optimizer` for what is decayed.
        lr: highest learning rate.
        weight_decay: of the decayed parameters.
        layer_decay: factor of the rate from one layer to the one before it, for fine-tuning.
        frozen_stages: stages that are not trained, with their norms in evaluation mode: 0 is the stem alone.
        schedule: the rule of a published recipe. Without it `warmup_epochs` and `min_lr_ratio` count.
        warmup_epochs: epochs, or parts of one, in which the rate rises linearly from near zero.
        min_lr_ratio: the rate at the end of the cosine, as a share of `lr`.
        agc: adaptive gradient clipping (Brock et al., arXiv:2102.06171): largest ratio of the norms of
            gradient and weights, unit by unit, over all parameters. The trainer's `gradient_clip_val` clips
            the global norm.
        ema_decay: average the weights exponentially, per step; see `lightspine.training.ema`.
        export_weights: with `ema_decay`, the weights that are validated and exported as `model.safetensors`:
            "ema" or "raw". The others are exported to a second file.
        max_bad_steps: so many steps with a non-finite loss or gradient in a row end the run.
        seed: of the initial weights and, with the step, of everything random in training.

    Attributes:
        model: the network; set by the derived task.
        model_name: what names it to a user, and its run.
        num_classes: number of classes, which must be that of the data.
        score: name of the metric of the validation that tells the best epoch, higher is better.
        curves: names of the metrics that are drawn together.
        guard: counts the steps that were skipped.
        bad_images: the images that could not be used so far.

    Raises:
        UsageError: a value out of its range.
    """

    model: nn.Module
    model_name: str
    num_classes: int
    score: ClassVar[str]
    curves: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(
        self,
        *,
        optimizer: OptimizerName = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        frozen_stages: int | None = None,
        schedule: CosineSchedule | MilestoneSchedule | DecaySchedule | None = None,
        warmup_epochs: float = 1.0,
        min_lr_ratio: float = 0.01,
        agc: float | None = None,
        ema_decay: float | None = None,
        export_weights: ExportedWeights = "ema",
        max_bad_steps: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise UsageError(f"expected a learning rate above 0, got {lr}")
        if warmup_epochs < 0:
            raise UsageError(f"expected warmup_epochs of at least 0, got {warmup_epochs}")
        if agc is not None and agc <= 0:
            raise UsageError(f"expected agc above 0, got {agc}")
        if schedule is not None:
            schedule.check()
        self.optimizer_name = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.frozen_stages = frozen_stages
        self.schedule = schedule
        self.warmup_epochs = warmup_epochs
        self.min_lr_ratio = min_lr_ratio
        self.agc = agc
        self.ema_decay = ema_decay
        self.export_weights = export_weights
        self.seed = seed
        self.guard = NonFiniteGuard(max_bad_steps)
        self.bad_images = BadImageLog()
        self._ema = None if ema_decay is None else ema_callback(ema_decay, export_weights)
        self._frozen: list[str] = []

    @property
    def backbone(self) -> nn.Module:
        """The model of lightspine or timm in the network: the network itself, or what a head stands on."""
        return self.model

    @abstractmethod
    def save(self, path: Path, data: ImageDataModule, metadata: dict[str, str]) -> None:
        """Write the network as a file that tells how to build it.

        Args:
            path: ends in .safetensors.
            data: what it was trained on.
            metadata: further strings.
        """

    def build_model(self, name: str, **arguments: Any) -> None:
        """Make the network, with weights drawn from the task's seed, and freeze what is not trained.

        Args:
            name: of a model of lightspine or timm.
            **arguments: see `lightspine.create_model`.

        Raises:
            UsageError: an unknown model or argument.
            LightspineError: a checkpoint that cannot be read.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                self.model = create_model(name, **arguments)
            except TypeError as error:
                if "unexpected keyword argument" not in str(error):
                    raise
                raise UsageError(f"wrong arguments of the model {name}: {error}") from error
        if self.frozen_stages is not None:
            self._frozen = freeze_stages(self.model, self.frozen_stages)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that averages the weights, if they are averaged."""
        return [] if self._ema is None else [self._ema]

    def train(self, mode: bool = True) -> "LightspineTask":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if mode and self._frozen:
            hold_frozen(self.model, self._frozen)
        return self

    def on_train_start(self) -> None:
        """Refuse two ways of clipping, and let the guard see the network as it is."""
        if self.agc is not None and self.trainer.gradient_clip_val:
            raise UsageError(
                f"expected either agc or the trainer's gradient_clip_val, got both ({self.agc} and "
                f"{self.trainer.gradient_clip_val})"
            )
        self._compare_length()
        self.guard.start(self.model)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002  Lightning's signature
        """Seed by the position: a resumed run draws the same numbers as one that was never stopped."""
        seed_generators(self.seed, self.current_epoch, batch_idx, self.global_rank)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Leave out a step that would make the weights non-finite."""
        where = f"step {self.global_step} (epoch {self.current_epoch}), learning rate {self.current_lr():.3g}"
        self.guard.check_gradients(self.model, scaler=self._scaler(), where=where)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip unit by unit with `agc`, else as the trainer says."""
        if self.agc is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            adaptive_clip_grad([p for p in self.model.parameters() if p.grad is not None], self.agc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser and its rate per step."""
        # The fused one would divide by the scale itself, behind the guard and the clipping.
        optimizer = self.create_optimizer(fused=self.device.type == "cpu" and self._scaler() is None)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise UsageError("expected an end of the training: trainer.max_epochs or trainer.max_steps")
        # Not total / max_epochs: max_steps may end the run before its epochs.
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        if self.schedule is None:
            warmup = round(per_epoch * self.warmup_epochs)
            schedule = lr_scheduler_config(
                optimizer, lambda step: warmup_cosine(step, warmup, int(total), self.min_lr_ratio)
            )
        else:
            rule, batch = self.schedule, self._total_batch()
            schedule = lr_scheduler_config(
                optimizer,
                lambda step: (
                    rule.rate(step, lr=self.lr, steps_per_epoch=per_epoch, total_batch=batch) / self.lr
                ),
            )
        return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": schedule})

    def create_optimizer(self, *, fused: bool) -> torch.optim.Optimizer:
        """Return the optimiser; see `lightspine.training.optim.create_optimizer`."""
        return create_optimizer(
            self.model,
            self.optimizer_name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            fused=fused,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts of the guard."""
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counts of the guard."""
        if "guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["guard"])

    def current_lr(self) -> float:
        """Return the highest learning rate of all groups, now."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer | pl.core.optimizer.LightningOptimizer)
        return float(max(group["lr"] for group in optimizer.param_groups))

    def averaged(self) -> nn.Module | None:
        """Return the averaged network, or None without an average or before the first step."""
        return averaged_model(self.trainer)

    def watch(self, loss: Tensor, *inputs: Any) -> Tensor:
        """Show a loss to the guard and return it; with what the network was given a culprit can be named."""
        self.guard.check_loss(loss, self.model, *inputs)
        return loss

    def record_bad_images(self, bad: Iterable[BadImage]) -> None:
        """Record images that could not be used."""
        self.bad_images.add(bad)

    def log_bad_images(self) -> None:
        """Log a warning with the names of the skipped images, if there are new ones."""
        self.bad_images.report(_log)

    def _compare_length(self) -> None:
        """Say where the run is not as long as its schedule."""
        if self.schedule is None:
            return
        for unit, planned, given in (
            ("epochs", self.schedule.total_epochs, self.trainer.max_epochs),
            ("steps", self.schedule.total_steps, self.trainer.max_steps),
        ):
            if planned is not None and planned != given:
                _log.info("the run has %s %s, its schedule %g", given, unit, planned)

    def _scaler(self) -> Any:
        """Return the gradient scaler of 16-mixed, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _total_batch(self) -> int:
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if size is None:
            raise UsageError("expected a data module with a batch_size, by which the schedule is scaled")
        return int(size) * self.trainer.world_size * self.trainer.accumulate_grad_batches
