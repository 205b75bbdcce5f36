"""Image classification: the loss of every published recipe, and the scores."""

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightspine.data.dataset import Batch
from lightspine.data.modules import ImageDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.models.checkpoint import save_checkpoint
from lightspine.training.base import LightspineTask
from lightspine.training.distillation import Distiller, Mesa
from lightspine.training.lr_schedules import CosineSchedule


class ClassificationTask(LightspineTask):
    """Trains any model of lightspine or timm to tell classes apart.

    Args:
        model: name of the model.
        num_classes: number of classes; the command line takes it from the data.
        model_args: further arguments of the model, such as `drop_path_rate` or `img_size`.
        checkpoint: a file of weights to start from, ours or a published one; the classifier is made anew
            where the number of classes differs.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of CutMix; 0 is off.
        mix_prob: probability that a batch is mixed.
        cutmix_prob: probability that a mixed batch is mixed by CutMix, where both are on.
        teacher: arguments of a `Distiller` but the number of classes: the name of the `teacher`, the `kind`,
            `alpha`, ...; without it nobody teaches.
        mesa: arguments of `Mesa`, self-distillation from the averaged weights; `{}` for its defaults. Needs
            `ema_decay`, and no teacher.
        **options: see `LightspineTask`: optimiser, schedule, clipping, average, seed.

    Raises:
        UsageError: an unknown model, a value out of its range, a teacher with other classes.
        LightspineError: a checkpoint that cannot be read.
    """

    score = "val_top1"
    curves = (("train_loss", "val_loss"), ("val_top1", "val_top5"), ("lr",))

    def __init__(
        self,
        model: str,
        num_classes: int,
        model_args: dict[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        cutmix_prob: float = 0.5,
        teacher: dict[str, Any] | None = None,
        mesa: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if num_classes < 2:
            raise UsageError(f"expected at least 2 classes, got {num_classes}")
        for name, value in (("mix_prob", mix_prob), ("cutmix_prob", cutmix_prob)):
            if not 0 <= value <= 1:
                raise UsageError(f"expected a probability {name} from 0 to 1, got {value}")
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"expected a label_smoothing from 0 to 1, got {label_smoothing}")
        self.model_name = model
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.build_model(model, checkpoint=checkpoint, num_classes=num_classes, **(model_args or {}))
        self.mix = (
            Mixup(
                mixup,
                cutmix,
                prob=mix_prob,
                switch_prob=cutmix_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
            if mixup or cutmix
            else None
        )
        # Not submodules: a teacher is neither trained nor saved.
        self.distiller = (
            None if teacher is None else _make("teacher", Distiller, teacher, num_classes=num_classes)
        )
        self.mesa = None if mesa is None else _make("mesa", Mesa, mesa)
        if self.distiller is not None:
            self.distiller.prepare_student(self.model)
        if self.mesa is not None and (self.distiller is not None or self.ema_decay is None):
            raise UsageError("MESA learns from averaged weights: expected an ema_decay and no teacher")
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        # With five classes or fewer the right one is always among the first five.
        self.top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro") if num_classes > 5 else None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (N, num_classes) of images (N, C, H, W); a distilled model trains with a pair."""
        return self.model(images)

    def save(self, path: Path, data: ImageDataModule, metadata: dict[str, str]) -> None:
        """Write the model as a file that tells its classes and how its images are prepared."""
        save_checkpoint(
            self.model,
            path,
            class_names=data.class_names,
            preprocessing=data.preprocessing.to_dict(),
            metadata=metadata,
        )

    def on_train_start(self) -> None:
        """Tell the teacher how the images are normalised."""
        super().on_train_start()
        preprocessing = getattr(getattr(self.trainer, "datamodule", None), "preprocessing", None)
        if self.distiller is not None and preprocessing is not None:
            self.distiller.expect_images(preprocessing.mean, preprocessing.std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning's signature
        """Return the loss of a batch, over the heads of a distilled model without a teacher its mean."""
        images, labels, bad = batch
        self.record_bad_images(bad)
        if len(images) == 0:
            raise LightspineError(f"none of the training images can be used; {bad[0].reason}")
        targets = labels
        if self.mix is not None and len(images) > 1:
            even = len(images) // 2 * 2  # timm's Mixup pairs the images of a batch
            images, targets = self.mix(images[:even], labels[:even])
        loss = self.watch(self.training_loss(images, targets), images)
        # A bad one is skipped by the guard, and would spoil the mean of the epoch.
        if torch.isfinite(loss):
            self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        self.log("lr", self.current_lr(), prog_bar=True)
        return loss

    def training_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the loss that is minimised.

        Args:
            images: (N, C, H, W), mixed or not.
            targets: classes (N,), or after mixing shares (N, K), which have been smoothed already.
        """
        output = self.model(images)
        if self.distiller is not None:
            return self.distiller.loss(output, targets, images, self._base_loss)
        if not isinstance(output, Tensor):
            return torch.stack([self._base_loss(head, targets) for head in output]).mean()
        loss = self._base_loss(output, targets)
        if self.mesa is not None and self.mesa.is_active(self.current_epoch, self._schedule_epochs()):
            averaged = self.averaged()
            assert averaged is not None  # the callback has made it before the first step
            loss = loss + self.mesa.loss(output, averaged, images)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Count the hits of a batch."""
        images, labels, bad = batch
        self.record_bad_images(bad)
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
        self.log_bad_images()
        if not self.top1.update_called:
            reason = next(iter(self.bad_images.reasons.values()), "there is none")
            raise LightspineError(f"none of the validation images can be used; {reason}")
        # Stops before the checkpoint of this epoch is written, so the last one on disk is a good one.
        if not torch.isfinite(self.trainer.callback_metrics["val_loss"]):
            raise LightspineError(
                f"the validation loss is not finite at step {self.global_step} (epoch {self.current_epoch}) "
                f"with learning rate {self.current_lr():.3g}"
            )
        scores = {"val_top1": self.top1} | ({"val_top5": self.top5} if self.top5 is not None else {})
        for name, metric in scores.items():
            self.log(name, 100 * metric.compute(), prog_bar=name == "val_top1", sync_dist=True)
            metric.reset()

    def _base_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        # Mixed targets have been smoothed already.
        smoothing = self.label_smoothing if targets.dim() == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def _schedule_epochs(self) -> int:
        if isinstance(self.schedule, CosineSchedule):
            return int(self.schedule.epochs)
        return self.trainer.max_epochs or 1


def _make(key: str, kind: Any, settings: dict[str, Any], **more: Any) -> Any:
    try:
        inspect.signature(kind).bind(**settings, **more)
    except TypeError as error:
        raise UsageError(f"wrong settings under {key}: {error}") from error
    return kind(**settings, **more)
