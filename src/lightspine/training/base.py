"""Base LightningModule: optimizer, schedule, clipping, RNG seeding and non-finite handling."""

import json
import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn

from lightspine._version import __version__
from lightspine.data.bad_images import BadImage, BadImageLog
from lightspine.data.modules import ImageDataModule
from lightspine.errors import UsageError
from lightspine.models.checkpoint import CKPT_METADATA, VERSION_KEY, WEIGHTS_KEY
from lightspine.models.factory import create_model
from lightspine.models.metadata import RUN_KEY
from lightspine.models.saving import write_safetensors
from lightspine.training.checkpoint import forget_foreign_files
from lightspine.training.ema import ExportedWeights, averaged_model, ema_callback
from lightspine.training.finetuning import freeze_stages, hold_frozen
from lightspine.training.lr_schedules import CosineSchedule, DecaySchedule, MilestoneSchedule, warmup_cosine
from lightspine.training.nonfinite import NonFiniteGuard
from lightspine.training.optim import OptimizerName, create_optimizer, lr_scheduler_config
from lightspine.training.precision import convert_to_true_precision
from lightspine.utils.seeding import seed_generators

_log = logging.getLogger(__name__)


class LightspineTask(pl.LightningModule):
    """Base class of the training tasks. A subclass defines the loss and the metrics.

    Args:
        optimizer: timm's name of the optimizer; see `lightspine.training.optim.create_optimizer`.
        lr: peak learning rate.
        weight_decay: weight decay; norms and biases have none by default.
        layer_decay: factor between the learning rates of neighboring layers, for fine-tuning.
        frozen_stages: number of stages to freeze, with norms in evaluation mode; 0 freezes only the stem.
        schedule: learning-rate schedule. By default linear warm-up and cosine decay with `warmup_epochs` and
            `min_lr_ratio`.
        warmup_epochs: length of the warm-up in epochs, which may be fractional.
        min_lr_ratio: learning rate at the end of the cosine, as a fraction of `lr`.
        agc: adaptive gradient clipping (Brock et al., arXiv:2102.06171): maximum ratio of gradient norm to
            weight norm, per unit, over all parameters. To clip the global norm use the trainer's
            `gradient_clip_val`.
        ema_decay: decay of the exponential moving average of the weights, per step; see
            `lightspine.training.ema`.
        export_weights: with `ema_decay`, the weights that are validated and exported as `model.safetensors`:
            "ema" or "raw". The others are exported to a second file.
        max_bad_steps: number of consecutive non-finite steps (loss or gradient) after which the run stops.
        seed: seed of the initial weights and, together with the step, of all randomness in training.

    Attributes:
        model: the model in training; set by the subclass.
        model_name: name of the model in messages and in the default folder of the run.
        num_classes: number of classes of the model and the data.
        score: name of the validation metric that selects the best epoch; higher is better.
        curves: names of the metrics in each subplot of `curves.png`.
        guard: skips and counts non-finite steps.
        bad_images: log of the images that could not be used so far.
        recipe: `name` and `config` of the recipe, set by the command line; they are saved with the model.

    Raises:
        UsageError: a value is out of range.
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
        self.recipe: dict[str, Any] = {}
        self._ema = None if ema_decay is None else ema_callback(ema_decay, export_weights)
        self._frozen: list[str] = []
        self._validated_step: int | None = None

    @property
    def backbone(self) -> nn.Module:
        """The model of lightspine or timm: the whole model of a classifier, or the backbone under a head."""
        return self.model

    def prepare(self, data: ImageDataModule) -> None:
        """Adopt the settings of the training data; called before the training starts."""

    @abstractmethod
    def model_metadata(self, data: ImageDataModule) -> dict[str, str]:
        """Return the metadata that rebuild the model: name, arguments, classes, preprocessing and settings.

        Args:
            data: the training data, which has the class names and the preprocessing.
        """

    def run_metadata(
        self, data: ImageDataModule, *, epochs: int | None = None, score: float | None = None
    ) -> dict[str, str]:
        """Return the metadata of every file of the run: the model, the recipe, the split and the score.

        Args:
            data: the training data.
            epochs: number of finished epochs.
            score: validation score of the weights in percent.
        """
        split = data.split_record()
        run = {"seed": self.seed, "data": None if split is None else split.to_dict()} | self.recipe
        optional = {"epochs": None if epochs is None else str(epochs)}
        optional[self.score] = None if score is None else f"{score:.2f}"
        return (
            self.model_metadata(data)
            | {RUN_KEY: json.dumps(run), "seed": str(self.seed)}
            | {key: value for key, value in optional.items() if value is not None}
        )

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Save the model.

        Args:
            path: a .safetensors file.
            metadata: from `run_metadata`.
        """
        write_safetensors(self.model, path, metadata)

    def build_model(self, name: str, **arguments: Any) -> None:
        """Create the model with weights initialized from the task's seed, and freeze its `frozen_stages`.

        Args:
            name: name of a model of lightspine or timm.
            **arguments: see `lightspine.create_model`.

        Raises:
            UsageError: the model or an argument is unknown.
            LightspineError: the checkpoint cannot be read.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                self.model = create_model(name, **arguments)
            except TypeError as error:
                if "unexpected keyword argument" not in str(error):
                    raise
                raise UsageError(f"invalid arguments of the model {name}: {error}") from error
        if self.frozen_stages is not None:
            self._frozen = freeze_stages(self.model, self.frozen_stages)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the EMA callback, if `ema_decay` is set."""
        return [] if self._ema is None else [self._ema]

    def setup(self, stage: str) -> None:
        """Convert the task to the run's precision before a checkpoint is loaded."""
        if stage == "fit":
            convert_to_true_precision(self.trainer, self)

    def train(self, mode: bool = True) -> "LightspineTask":
        """Set the mode, but keep frozen stages in evaluation mode."""
        super().train(mode)
        if mode and self._frozen:
            hold_frozen(self.model, self._frozen)
        return self

    def on_train_start(self) -> None:
        """Check that only one kind of gradient clipping is set, and start the non-finite guard."""
        if self.agc is not None and self.trainer.gradient_clip_val:
            raise UsageError(
                f"expected either agc or the trainer's gradient_clip_val, got both ({self.agc} and "
                f"{self.trainer.gradient_clip_val})"
            )
        self._log_length_mismatch()
        trainer: Any = self.trainer  # `log_every_n_steps` is unknown to its types
        self.guard.start(self.model, read_every=trainer.log_every_n_steps)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002  Lightning's signature
        """Seed by epoch, batch and rank, so that a resumed run reproduces an uninterrupted one."""
        seed_generators(self.seed, self.current_epoch, batch_idx, self.global_rank)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step with a non-finite loss or gradient."""
        where = f"step {self.global_step} (epoch {self.current_epoch}), learning rate {self.current_lr():.3g}"
        self.guard.check_step(self.model, optimizer, scaler=self._scaler(), where=where)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Read the results of the epoch's last steps before the validation."""
        if self.trainer.is_last_batch:
            self.guard.read()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Apply adaptive gradient clipping if `agc` is set, else the trainer's clipping."""
        if self.agc is not None:
            adaptive_clip_grad([p for p in self.model.parameters() if p.grad is not None], self.agc)
            return
        plugin = self.trainer.precision_plugin
        if type(plugin) is MixedPrecision and plugin.scaler is None and gradient_clip_val:
            # It refuses to clip for a fused optimizer, even without a scaler.
            kind = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, kind)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its learning-rate scheduler, which is updated every step."""
        # With a gradient scaler, a fused optimizer would unscale only after the guard and the clipping.
        fused = self.device.type in ("cpu", "cuda") and self._scaler() is None
        optimizer = self.create_optimizer(fused=fused)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise UsageError("expected trainer.max_epochs or trainer.max_steps, got neither")
        # Not total / max_epochs: max_steps may end the run earlier.
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
        """Create the optimizer; see `lightspine.training.optim.create_optimizer`."""
        return create_optimizer(
            self.model,
            self.optimizer_name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            fused=fused,
        )

    def on_validation_end(self) -> None:
        """Record which weights the current score belongs to."""
        self._validated_step = self.trainer.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters of the non-finite guard, and the metadata that every file of the run has."""
        self.guard.read()
        checkpoint["guard"] = self.guard.state_dict()
        data = getattr(self.trainer, "datamodule", None)
        # Without a data module there are no class names: such a file can be resumed, but not evaluated.
        if isinstance(data, ImageDataModule):
            validated = self._validated_step == self.trainer.global_step
            score = self.trainer.callback_metrics.get(self.score) if validated else None
            checkpoint[CKPT_METADATA] = {VERSION_KEY: __version__} | self.run_metadata(
                data,
                epochs=self.trainer.fit_loop.epoch_progress.current.processed,  # type: ignore[attr-defined]
                score=None if score is None else float(score),
            )
            if self.ema_decay is not None:
                chosen = "ema" if self.export_weights == "ema" else "model"
                checkpoint[CKPT_METADATA][WEIGHTS_KEY] = chosen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters of the non-finite guard, before the callbacks restore their states."""
        forget_foreign_files(checkpoint.get("callbacks", {}), Path(self.trainer.default_root_dir))
        if "guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["guard"])

    def current_lr(self) -> float:
        """Return the current learning rate: the highest of all parameter groups."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer | pl.core.optimizer.LightningOptimizer)
        return float(max(group["lr"] for group in optimizer.param_groups))

    def ema_model(self) -> nn.Module | None:
        """Return the EMA of the model, or None without EMA or before training starts."""
        return averaged_model(self.trainer)

    def check_loss(self, loss: Tensor, *inputs: Any) -> Tensor:
        """Check a loss with the non-finite guard and return it; `inputs` are those of the model."""
        self.guard.check_loss(loss, self.model, *inputs)
        return loss

    def log_train_losses(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Log the losses of a batch as means over the epoch, and the learning rate, without a host read.

        Batches whose "train_loss" is not finite are left out, because the guard skips their steps.

        Args:
            losses: metric name -> scalar loss, with "train_loss".
            images: number of images of the batch.
        """
        finite = torch.isfinite(losses["train_loss"].detach())
        # Lightning multiplies the value by the batch size, which may be a tensor.
        weight: Any = finite * images
        for name, value in losses.items():
            kept = torch.where(finite, value.detach(), 0.0)
            shown = name == "train_loss"
            # Ranks exchange the sums at the end of the epoch, not in a step.
            self.log(
                name,
                kept,
                on_step=False,
                on_epoch=True,
                prog_bar=shown,
                batch_size=weight,
                sync_dist=True,
            )
        # A tensor in the memory of the host: Lightning would copy a number to the device and wait for it,
        # and the progress bar would wait again to read it.
        self.log("lr", torch.tensor(self.current_lr()), prog_bar=True)

    def record_bad_images(self, bad: Iterable[BadImage]) -> None:
        """Record images that could not be used."""
        self.bad_images.add(bad)

    def log_bad_images(self) -> None:
        """Log a warning about skipped images, if there are new ones."""
        self.bad_images.report(_log)

    def _log_length_mismatch(self) -> None:
        """Log a message if the run and its schedule have different lengths."""
        if self.schedule is None:
            return
        for unit, planned, given in (
            ("epochs", self.schedule.total_epochs, self.trainer.max_epochs),
            ("steps", self.schedule.total_steps, self.trainer.max_steps),
        ):
            if planned is not None and planned != given:
                _log.info("the run has %s %s, its schedule %g", given, unit, planned)

    def _scaler(self) -> Any:
        """Return the gradient scaler of 16-mixed precision, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _total_batch(self) -> int:
        """Return the images per optimizer step over all devices."""
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if size is None:
            raise UsageError("expected a data module with a batch_size for the schedule, got none")
        return int(size) * self.trainer.world_size * self.trainer.accumulate_grad_batches
