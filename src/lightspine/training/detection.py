"""Object detection and instance segmentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightspine.data.detection import DetectionBatch
from lightspine.data.modules import CocoDataModule
from lightspine.dense import create_detector
from lightspine.dense.coco_metrics import CocoMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.heads.detectors import DetectorName
from lightspine.heads.features import MapNorm
from lightspine.models.checkpoint import Weights
from lightspine.training.dense import DenseTask


class DetectionTask(DenseTask):
    """Trains a detector over any model of lightspine or timm.

    Args:
        model: name of the model that gives the maps.
        num_classes: number of classes; the command line takes it from the data.
        head: "retinanet", "mask_rcnn" or "cascade_mask_rcnn".
        model_args: further arguments of the model, such as `drop_path_rate`.
        checkpoint: weights to start from: of the model's classifier, or a detector of the same head and
            model.
        weights: which entry of a classifier's file: "model", "ema" or "auto"; see
            `lightspine.dense.create_detector`.
        norm: "layer" puts a LayerNorm over each map; see `lightspine.heads.FeatureBackbone`.
        freeze_batch_norm: keep the model's batch norms in evaluation mode.
        channels: width of the pyramid.
        resize: shorter and longest side that images are brought to outside training, in pixels; `None` leaves
            them.
        score_threshold: least score of a detection.
        detections_per_image: most detections of an image, in the scores too.
        anchor_scale: factor of the published anchors' sides, which begin at 32 px.
        undecayed: parts of the names of parameters that are not decayed; see
            `lightspine.training.optim.dense_parameter_groups`.
        layer_decay_blocks: likewise.
        **options: see `LightspineTask`: optimiser, schedule, clipping, average, seed.

    Raises:
        UsageError: an unknown name, a value out of its range.
        LightspineError: a checkpoint that cannot be read or does not fit.
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
        norm: MapNorm = "none",
        freeze_batch_norm: bool = False,
        channels: int = 256,
        resize: tuple[int, int] | None = (800, 1333),
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
                "resize": resize,
                "score_threshold": score_threshold,
                "detections_per_image": detections_per_image,
                "anchor_scale": anchor_scale,
            },
            undecayed=undecayed,
            layer_decay_blocks=layer_decay_blocks,
            **options,
        )
        self.has_masks = head != "retinanet"
        self.detections_per_image = detections_per_image
        self._metrics: CocoMetrics | None = None

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses in training, else the detections of each image (3, H, W), 0..1."""
        return self.network(images, targets)

    def on_fit_start(self) -> None:
        """Refuse data that lacks the masks that the head learns from, or reads them for nothing."""
        super().on_fit_start()
        masks = self.data_module(CocoDataModule).masks
        if masks != self.has_masks:
            raise UsageError(
                f"expected data with masks={str(self.has_masks).lower()} for {self.model_name}, got "
                f"masks={str(masks).lower()}"
            )

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the sum of the detector's losses."""
        images, targets, bad = batch
        self.record_bad_images(bad)
        if not images:
            raise LightspineError(f"none of the training images can be used; {bad[0].reason}")
        loss = self.log_losses(self.network(images, targets), len(images))
        return self.watch(loss, images, targets)

    def on_validation_epoch_start(self) -> None:
        """Begin to gather detections."""
        data = self.data_module(CocoDataModule)
        # 100 by the definition of COCO's numbers; a limit above it is meant for crowded images.
        most = max(self.detections_per_image, 100)
        self._metrics = CocoMetrics(data.val_annotations, most_detections=most)

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Detect the objects of a batch."""
        assert self._metrics is not None
        self.record_bad_images(batch.bad)
        if batch.images:
            numbers = [int(target["image_id"]) for target in batch.targets]
            self._metrics.update(numbers, self.network(batch.images))

    def on_validation_epoch_end(self) -> None:
        """Score the detections of all processes: COCO's 12 numbers for boxes and masks."""
        assert self._metrics is not None
        self._metrics.all_gather()
        self.check_validated(self._metrics.num_images)
        for kind, numbers in self._metrics.compute().items():
            self.log_scores({f"{kind}_{name}": value for name, value in numbers.items()})
