"""Image classification as a LightningModule: the loss, the optimiser, the schedule and the scores."""

import logging
import math
import random
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lightspine.data.image_folder import BadImage, Batch
from lightspine.errors import LightspineError, UsageError
from lightspine.models._factory import create_model

OptimizerName = Literal["adamw", "sgd", "lamb"]

_log = logging.getLogger(__name__)
_NAMED_IMAGES = 5


class ClassificationTask(pl.LightningModule):
    """Trains any model of lightspine or timm to tell classes apart.

    Args:
        model: name of the model.
        num_classes: number of classes; the command line takes it from the data.
        model_args: further arguments of the model, such as `drop_path_rate` or `img_size`.
        checkpoint: a file of weights to start from, ours or a published one; the classifier is made anew
            where the number of classes differs.
        optimizer: made by timm; biases, norms and what the model's `no_weight_decay()` names are not decayed.
        lr: highest learning rate, reached after the warm-up.
        weight_decay: of the decayed parameters.
        warmup_epochs: epochs, or parts of one, in which the rate rises linearly from near zero.
        min_lr_ratio: the rate at the end of the cosine, as a share of `lr`.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of CutMix; 0 is off.
        seed: of the initial weights and, with the epoch, of everything random in training.

    Attributes:
        model: the network.
        skipped: path -> reason of every image that could not be used so far.

    Raises:
        UsageError: an unknown model, a value out of its range.
        LightspineError: a checkpoint that cannot be read.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        model_args: dict[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        optimizer: OptimizerName = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_epochs: float = 1.0,
        min_lr_ratio: float = 0.01,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_ranges(num_classes, lr, warmup_epochs, label_smoothing)
        self.model_name = model
        self.optimizer_name = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.min_lr_ratio = min_lr_ratio
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.skipped: dict[str, str] = {}
        self._announced = 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = create_model(
                model, checkpoint=checkpoint, num_classes=num_classes, **(model_args or {})
            )
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
            if mixup or cutmix
            else None
        )
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        # With five classes or fewer the right one is always among the first five.
        self.top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro") if num_classes > 5 else None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (N, num_classes) of images (N, C, H, W); a distilled model trains with a pair."""
        return self.model(images)

    def on_train_epoch_start(self) -> None:
        """Seed by the epoch: a resumed run draws the same numbers as one that was never stopped."""
        seed_generators(self.seed + 1009 * self.current_epoch + self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning's signature
        """Return the loss of a batch, over the heads of a distilled model its mean."""
        images, labels, bad = batch
        self._note_skipped(bad)
        if len(images) == 0:
            raise LightspineError(f"none of the training images can be used; {bad[0].reason}")
        targets = labels
        if self.mix is not None and len(images) > 1:
            even = len(images) // 2 * 2  # timm's Mixup pairs the images of a batch
            images, targets = self.mix(images[:even], labels[:even])
        loss = self._loss(self.model(images), targets)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss became {loss.detach().item()}")
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        self.log("lr", self._current_lr(), prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Refuse a step that would make the weights non-finite."""
        # A gradient scaler meets infinite gradients in its normal work and skips such a step by itself.
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            raise self._diverged(f"the gradient's norm became {norm.item()}")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Count the hits of a batch."""
        images, labels, bad = batch
        self._note_skipped(bad)
        if len(images) == 0:
            return
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        self.top1.update(logits, labels)
        if self.top5 is not None:
            self.top5.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the scores and name the images that were skipped."""
        self._announce_skipped()
        if not self.top1.update_called:
            reason = next(iter(self.skipped.values()), "there is none")
            raise LightspineError(f"none of the validation images can be used; {reason}")
        # Stops before the checkpoint of this epoch is written, so the last one on disk is a good one.
        if not torch.isfinite(self.trainer.callback_metrics["val_loss"]):
            raise self._diverged("the validation loss is not finite")
        scores = {"val_top1": self.top1} | ({"val_top5": self.top5} if self.top5 is not None else {})
        for name, metric in scores.items():
            self.log(name, 100 * metric.compute(), prog_bar=name == "val_top1", sync_dist=True)
            metric.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimiser and its rate per step: a linear warm-up, then a cosine."""
        # One pass over the weights instead of ten: on a CPU a plain AdamW step costs half a forward pass.
        fused = self.optimizer_name == "adamw" and self.device.type == "cpu"
        options: dict[str, Any] = {"fused": True} if fused else {}
        optimizer = create_optimizer_v2(
            self.model,  # itself and not its parameters, so that timm asks for its no_weight_decay()
            opt=self.optimizer_name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            **options,
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * self.warmup_epochs / (self.trainer.max_epochs or 1))
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total, self.min_lr_ratio))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, output: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            return torch.stack([self._loss(head, targets) for head in output]).mean()
        # Mixed targets have been smoothed already.
        smoothing = 0.0 if self.mix is not None else self.label_smoothing
        return F.cross_entropy(output, targets, label_smoothing=smoothing)

    def _current_lr(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def _diverged(self, what: str) -> LightspineError:
        where = f"step {self.global_step} (epoch {self.current_epoch})"
        return LightspineError(f"{what} at {where} with learning rate {self._current_lr():.3g}")

    def _note_skipped(self, bad: list[BadImage]) -> None:
        self.skipped.update((image.path, image.reason) for image in bad)

    def _announce_skipped(self) -> None:
        if len(self.skipped) == self._announced:
            return
        self._announced = len(self.skipped)
        reasons = list(self.skipped.values())
        more = f"; and {len(reasons) - _NAMED_IMAGES} more" if len(reasons) > _NAMED_IMAGES else ""
        _log.warning("skipped %d images: %s%s", len(reasons), "; ".join(reasons[:_NAMED_IMAGES]), more)


def seed_generators(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators; leaves the environment alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Return the factor of the rate: linear up over `warmup` steps, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _check_ranges(num_classes: int, lr: float, warmup_epochs: float, label_smoothing: float) -> None:
    if num_classes < 2:
        raise UsageError(f"expected at least 2 classes, got {num_classes}")
    if lr <= 0:
        raise UsageError(f"expected a learning rate above 0, got {lr}")
    if warmup_epochs < 0:
        raise UsageError(f"expected warmup_epochs of at least 0, got {warmup_epochs}")
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"expected a label_smoothing from 0 to 1, got {label_smoothing}")
