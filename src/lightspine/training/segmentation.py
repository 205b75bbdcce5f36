"""Semantic segmentation task: segmenter losses and mIoU."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lightspine.data.modules import ImageDataModule, SegmentationDataModule
from lightspine.data.segmentation import IGNORED, SegmentationBatch, SlidingWindowInference
from lightspine.dense import create_segmenter
from lightspine.dense.metrics import SegmentationMetrics
from lightspine.errors import LightspineError
from lightspine.heads.features import MapNorm
from lightspine.heads.segmenters import SegmenterName
from lightspine.models.checkpoint import Weights
from lightspine.training.dense import DenseTask


class SegmentationTask(DenseTask):
    """Trains a semantic segmenter with any model of lightspine or timm as backbone.

    Args:
        model: model name of the backbone.
        num_classes: number of classes; the command line sets it from the data.
        head: "semantic_fpn" or "upernet".
        model_args: further arguments of the backbone, such as `drop_path_rate`.
        checkpoint: initial weights: a classifier of the backbone, or a segmenter with the same head and
            backbone.
        weights: which weights of a classifier's file to load: "model", "ema" or "auto"; see
            `lightspine.dense.create_detector`.
        norm: "layer" applies a LayerNorm to each feature map; see `lightspine.heads.FeatureBackbone`.
            Default: that of a segmenter's checkpoint, else "none".
        freeze_batch_norm: keep the BatchNorm layers of the backbone in evaluation mode. Default: as in
            a segmenter's checkpoint, else False.
        channels: number of channels of the head; by default the published number.
        dropout: dropout rate before the classifiers.
        auxiliary_weight: weight of UPerNet's auxiliary loss; 0 removes the auxiliary head.
        test: inference settings: sliding `window` and `stride`, scale `ratios`, `flip`; see
            `lightspine.data.segmentation.SlidingWindowInference`.
        undecayed: substrings of the names of parameters without weight decay; see
            `lightspine.training.optim.dense_parameter_groups`.
        layer_decay_blocks: apply `layer_decay` to blocks too, not only to the stem.
        **options: optimizer, schedule, clipping, EMA and seed; see `LightspineTask`.

    Raises:
        UsageError: a name is unknown or a value is out of range.
        LightspineError: the checkpoint cannot be read or does not fit.
    """

    score = "val_mIoU"
    curves = (("train_loss",), ("val_mIoU", "val_mAcc", "val_aAcc"), ("lr",))

    def __init__(
        self,
        model: str,
        num_classes: int,
        head: SegmenterName = "upernet",
        model_args: dict[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        weights: Weights = "auto",
        norm: MapNorm | None = None,
        freeze_batch_norm: bool | None = None,
        channels: int | None = None,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        test: SlidingWindowInference | None = None,
        undecayed: Sequence[str] | None = None,
        layer_decay_blocks: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            create_segmenter,
            head,
            model,
            num_classes,
            model_args=model_args,
            checkpoint=checkpoint,
            weights=weights,
            norm=norm,
            freeze_batch_norm=freeze_batch_norm,
            head_args={
                "channels": channels,
                "dropout": dropout,
                "auxiliary_weight": auxiliary_weight,
                "ignore_index": IGNORED,
            },
            undecayed=undecayed,
            layer_decay_blocks=layer_decay_blocks,
            **options,
        )
        self.test = test or SlidingWindowInference()
        self.test.check()
        self._metrics: SegmentationMetrics | None = None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return logits (N, num_classes, H, W) of images (N, 3, H, W), or the losses if labels are given."""
        return self.network(images, labels)

    def settings(self, data: ImageDataModule) -> dict[str, Any]:
        """Return the image size and the inference settings that are saved with the model."""
        assert isinstance(data, SegmentationDataModule)
        sizes = {"scale": data.val_scale, "divisor": data.val_divisor, "resize_twice": True}
        return sizes | data.reading | asdict(self.test)

    def prepare(self, data: ImageDataModule) -> None:
        """Check that the data has label maps."""
        self.check_data(data, SegmentationDataModule)

    def on_fit_start(self) -> None:
        """Check the data, for a trainer of your own."""
        super().on_fit_start()
        self.prepare(self.data_module(SegmentationDataModule))

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss, including the auxiliary loss."""
        self.record_bad_images(batch.bad)
        if not batch.names:
            raise LightspineError(f"none of the training images can be used; {batch.bad[0].reason}")
        loss = self.log_losses(self.network(batch.images, batch.labels), len(batch.names))
        return self.check_loss(loss, batch.images, batch.labels)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self._metrics = SegmentationMetrics(
            self.data_module(SegmentationDataModule).class_names, ignored=IGNORED
        )

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Add a batch to the metrics, each image at the size of its label map."""
        assert self._metrics is not None
        self.record_bad_images(batch.bad)
        found = [
            self.test.classify(self.network, image, tuple(labels.shape))
            for image, labels in zip(batch.images, batch.labels, strict=True)
        ]
        self._metrics.update(batch.names, found, batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Gather the pixel counts of all ranks and log the metrics."""
        assert self._metrics is not None
        self._metrics.all_gather()
        self.check_validated(self._metrics.num_images)
        self.log_scores(dict(self._metrics.compute()))
