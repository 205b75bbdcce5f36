"""Image classification task: losses of the published recipes, and top-1 and top-5 accuracy."""

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightspine.data.dataset import Batch
from lightspine.data.modules import ImageDataModule
from lightspine.errors import LightspineError, UsageError
from lightspine.models.saving import model_metadata
from lightspine.training.base import LightspineTask
from lightspine.training.distillation import Distiller, Mesa
from lightspine.training.lr_schedules import CosineSchedule
from lightspine.training.mixing import Mixup


class ClassificationTask(LightspineTask):
    """Trains any model of lightspine or timm as a classifier.

    Args:
        model: model name.
        num_classes: number of classes; the command line sets it from the data.
        model_args: further arguments of the model, such as `drop_path_rate` or `img_size`.
        checkpoint: file of initial weights, from lightspine or an official repository. The classifier is
            initialized from scratch if the number of classes differs.
        label_smoothing: label smoothing, from 0 to below 1.
        mixup: alpha of mixup; 0 disables it.
        cutmix: alpha of CutMix; 0 disables it.
        mix_prob: probability of mixing a batch.
        cutmix_prob: probability of CutMix for a mixed batch if both are enabled.
        teacher: arguments of `lightspine.training.distillation.Distiller` except `num_classes`: `teacher`,
            `kind`, `alpha`, ... None trains without a teacher.
        mesa: arguments of `lightspine.training.distillation.Mesa`, self-distillation from the EMA model; `{}`
            uses the defaults. Requires `ema_decay` and no teacher.
        **options: optimizer, schedule, clipping, EMA and seed; see `LightspineTask`.

    Raises:
        UsageError: the model is unknown, a value is out of range, or the teacher's number of classes differs.
        LightspineError: the checkpoint cannot be read.
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
            raise UsageError(f"expected a label_smoothing from 0 to below 1, got {label_smoothing}")
        self.model_name = model
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.build_model(model, checkpoint=checkpoint, num_classes=num_classes, **(model_args or {}))
        self.mix = (
            Mixup(
                mixup,
                cutmix,
                prob=mix_prob,
                cutmix_prob=cutmix_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
            if mixup or cutmix
            else None
        )
        # Not submodules, so that the teacher is neither trained nor saved.
        self.distiller = (
            None if teacher is None else _construct("teacher", Distiller, teacher, num_classes=num_classes)
        )
        self.mesa = None if mesa is None else _construct("mesa", Mesa, mesa)
        if self.distiller is not None:
            self.distiller.prepare_student(self.model)
        if self.mesa is not None and (self.distiller is not None or self.ema_decay is None):
            raise UsageError("MESA distills from the EMA model: expected an ema_decay and no teacher")
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        # With at most five classes the top-5 accuracy is always 100 %.
        self.top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro") if num_classes > 5 else None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (N, num_classes) of images (N, C, H, W); `_dist` models return a pair in training."""
        return self.model(images)

    def model_metadata(self, data: ImageDataModule) -> dict[str, str]:
        """Return the name and arguments of the model, its class names and its preprocessing."""
        return model_metadata(
            self.model, class_names=data.class_names, preprocessing=data.preprocessing.to_dict()
        )

    def on_train_start(self) -> None:
        """Set the image normalization of the distiller."""
        super().on_train_start()
        preprocessing = getattr(getattr(self.trainer, "datamodule", None), "preprocessing", None)
        if self.distiller is not None and preprocessing is not None:
            self.distiller.expect_images(preprocessing.mean, preprocessing.std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning's signature
        """Return the loss of a batch."""
        images, labels, bad = batch
        self.record_bad_images(bad)
        if len(images) == 0:
            raise LightspineError(f"none of the training images can be used; {bad[0].reason}")
        targets = labels
        if self.mix is not None and len(images) > 1:
            # Like timm, which needs an even batch: otherwise the middle image would be mixed with itself.
            even = len(images) // 2 * 2
            images, targets = self.mix(images[:even], labels[:even])
        if images.dtype == torch.uint8:
            images = self._finish_images(images)
        loss = self.check_loss(self.training_loss(images, targets), images)
        self.log_train_losses({"train_loss": loss}, len(images))
        return loss

    def training_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss: cross-entropy, with distillation or MESA if set.

        A model with two heads but no teacher trains with the mean loss of both heads.

        Args:
            images: (N, C, H, W), after mixup or CutMix.
            targets: class indices (N,), or class probabilities (N, K) after mixup or CutMix.
        """
        output = self.model(images)
        if self.distiller is not None:
            return self.distiller.loss(output, targets, images, self._base_loss)
        if not isinstance(output, Tensor):
            return torch.stack([self._base_loss(head, targets) for head in output]).mean()
        loss = self._base_loss(output, targets)
        if self.mesa is not None and self.mesa.is_active(self.current_epoch, self._schedule_epochs()):
            ema = self.ema_model()
            assert ema is not None  # the EMA callback creates it before the first step
            loss = loss + self.mesa.loss(output, ema, images)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Update the metrics with a batch."""
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
        """Log the metrics and the skipped images."""
        self.log_bad_images()
        if not self.top1.update_called:
            reason = next(iter(self.bad_images.reasons.values()), "the validation split is empty")
            raise LightspineError(f"none of the validation images can be used; {reason}")
        # Stop before this epoch's checkpoint is written, so that the last one on disk is finite.
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
        # Mixup smooths its targets itself.
        smoothing = self.label_smoothing if targets.dim() == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def _finish_images(self, images: Tensor) -> Tensor:
        """Normalize and erase uint8 images, which are mixed before."""
        finish = getattr(getattr(self.trainer, "datamodule", None), "batch_transform", None)
        if finish is None:
            raise UsageError("expected normalized images, got uint8 from data without a batch_transform")
        return finish(images).to(self.dtype)

    def _schedule_epochs(self) -> int:
        if isinstance(self.schedule, CosineSchedule):
            return int(self.schedule.epochs)
        return self.trainer.max_epochs or 1


def _construct(key: str, kind: Any, settings: dict[str, Any], **more: Any) -> Any:
    """Call a class with the settings under a recipe key; name the key in errors about its arguments."""
    try:
        inspect.signature(kind).bind(**settings, **more)
    except TypeError as error:
        raise UsageError(f"invalid settings under {key}: {error}") from error
    return kind(**settings, **more)
