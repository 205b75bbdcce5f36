"""Object detection and instance segmentation task: detector losses and COCO metrics."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightspine.data.detection import DetectionBatch
from lightspine.data.modules import CocoDataModule, ImageDataModule
from lightspine.dense import create_detector
from lightspine.dense.inference import detect_by_size
from lightspine.dense.metrics import CocoMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.heads.detectors import DetectorName
from lightspine.heads.features import MapNorm
from lightspine.models.checkpoint import Weights
from lightspine.training.dense import DenseTask

_log = logging.getLogger(__name__)


class DetectionTask(DenseTask):
    """Trains a detector with any model of lightspine or timm as backbone.

    Args:
        model: model name of the backbone.
        num_classes: number of classes; the command line sets it from the data.
        head: "retinanet", "mask_rcnn" or "cascade_mask_rcnn".
        model_args: further arguments of the backbone, such as `drop_path_rate`.
        checkpoint: initial weights: a classifier of the backbone, or a detector with the same head and
            backbone.
        weights: which weights of a classifier's file to load: "model", "ema" or "auto"; see
            `lightspine.dense.create_detector`.
        norm: "layer" applies a LayerNorm to each feature map; see `lightspine.heads.FeatureBackbone`.
            Default: that of a detector's checkpoint, else "none".
        freeze_batch_norm: keep the BatchNorm layers of the backbone in evaluation mode. Default: as in
            a detector's checkpoint, else False.
        channels: number of channels of the feature pyramid.
        resize: shorter side and maximum longer side in pixels of the images in validation and later commands;
            "data" (the default) is the size of the training images, `None` keeps their size.
        score_threshold: minimum score of a detection.
        detections_per_image: maximum number of detections per image, also in the metrics.
        anchor_scale: factor of the anchor sizes, which start at 32 px.
        undecayed: substrings of the names of parameters without weight decay; see
            `lightspine.training.optim.dense_parameter_groups`.
        layer_decay_blocks: apply `layer_decay` to blocks too, not only to the stem.
        **options: optimizer, schedule, clipping, EMA and seed; see `LightspineTask`.

    Raises:
        UsageError: a name is unknown or a value is out of range.
        LightspineError: the checkpoint cannot be read or does not fit.
    """

    score = "val_box_AP"
    curves = (("train_loss",), ("val_box_AP", "val_box_AP50", "val_mask_AP", "val_mask_AP50"), ("lr",))

    def __init__(
        self,
        model: str,
        num_classes: int,
        head: DetectorName = "mask_rcnn",
        model_args: dict[str, Any] | None = None,
        checkpoint: str | Path | None = None,
        weights: Weights = "auto",
        norm: MapNorm | None = None,
        freeze_batch_norm: bool | None = None,
        channels: int = 256,
        resize: tuple[int, int] | Literal["data"] | None = "data",
        score_threshold: float = 0.05,
        detections_per_image: int = 100,
        anchor_scale: float = 1.0,
        undecayed: Sequence[str] | None = None,
        layer_decay_blocks: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            create_detector,
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
                # The size of the data is set when the training starts.
                "resize": None if resize == "data" else resize,
                "score_threshold": score_threshold,
                "detections_per_image": detections_per_image,
                "anchor_scale": anchor_scale,
            },
            undecayed=undecayed,
            layer_decay_blocks=layer_decay_blocks,
            **options,
        )
        self.resize = resize
        self.has_masks = head != "retinanet"
        self.detections_per_image = detections_per_image
        self._metrics: CocoMetrics | None = None

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses in training, else the detections per image.

        Args:
            images: tensors (3, H, W) with values from 0 to 1.
            targets: annotations per image, in training.
        """
        return self.network(images, targets)

    def prepare(self, data: ImageDataModule) -> None:
        """Set the image size to that of the data, and check that the data has masks as the head needs."""
        self.check_data(data, CocoDataModule)
        assert isinstance(data, CocoDataModule)
        if self.resize == "data":
            self.network.transform.set_resize(data.resize)
            self.network.init_args["options"]["resize"] = data.resize
        elif self.resize != data.resize:
            _log.info(
                "images are resized to %s px in training, but %s in validation and later commands (resize)",
                list(data.resize),
                "keep their size" if self.resize is None else f"to {list(self.resize)} px",
            )
        masks = data.masks
        if masks != self.has_masks:
            raise UsageError(
                f"expected data with masks={str(self.has_masks).lower()} for {self.model_name}, got "
                f"masks={str(masks).lower()}"
            )

    def on_fit_start(self) -> None:
        """Adopt the settings of the data, for a trainer of your own."""
        super().on_fit_start()
        self.prepare(self.data_module(CocoDataModule))

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the sum of the detector's losses."""
        images, targets, bad = batch
        self.record_bad_images(bad)
        if not images:
            raise LightspineError(f"none of the training images can be used; {bad[0].reason}")
        loss = self.log_losses(self.network(images, targets), len(images))
        return self.check_loss(loss, images, targets)

    def on_validation_epoch_start(self) -> None:
        """Reset the COCO metrics."""
        data = self.data_module(CocoDataModule)
        # COCO metrics use 100 detections per image; a higher limit is meant for crowded images.
        most = max(self.detections_per_image, 100)
        self._metrics = CocoMetrics(data.val_annotations, max_detections=most)

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Add the detections of a batch to the metrics."""
        assert self._metrics is not None
        self.record_bad_images(batch.bad)
        if batch.images:
            numbers = [int(target["image_id"]) for target in batch.targets]
            self._metrics.update(numbers, detect_by_size(self.network, batch.images))

    def on_validation_epoch_end(self) -> None:
        """Gather the detections of all ranks and log the 12 COCO metrics for boxes and masks."""
        assert self._metrics is not None
        self._metrics.all_gather()
        self.check_validated(self._metrics.num_images)
        for kind, numbers in self._metrics.compute().items():
            self.log_scores({f"{kind}_{name}": value for name, value in numbers.items()})
