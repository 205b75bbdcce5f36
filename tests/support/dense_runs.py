"""Short training runs of small detectors and segmenters on a few real images."""

from pathlib import Path
from typing import Any

from lightspine.data.modules import CocoDataModule, SegmentationFolderDataModule
from lightspine.training.detection import DetectionTask
from lightspine.training.fit import TrainResult, train
from lightspine.training.segmentation import SegmentationTask
from support.dense import few_proposals

SMALL_MODEL = "test_efficientnet"
# Strides 4 to 32.
SMALL_MAPS = {"out_indices": (1, 2, 3, 4)}


def detection_task(**options: Any) -> DetectionTask:
    """Return a small detector of the 80 classes of COCO; RetinaNet without other options."""
    task = DetectionTask(
        **{
            "model": SMALL_MODEL,
            "model_args": SMALL_MAPS,
            "num_classes": 80,
            "head": "retinanet",
            "channels": 16,
            "resize": (64, 96),
        }
        | options
    )
    few_proposals(task.model)
    return task


def detection_data(root: Path, **options: Any) -> CocoDataModule:
    """Return COCO's free images at 64 px."""
    return CocoDataModule(
        root,
        **{"masks": False, "shorter": 64, "longest": 96, "batch_size": 4, "num_workers": 0} | options,
    )


def segmentation_task(**options: Any) -> SegmentationTask:
    """Return a small segmenter of 133 classes."""
    return SegmentationTask(
        **{
            "model": SMALL_MODEL,
            "model_args": SMALL_MAPS,
            "num_classes": 133,
            "head": "semantic_fpn",
            "channels": 16,
        }
        | options
    )


def segmentation_data(root: Path, **options: Any) -> SegmentationFolderDataModule:
    """Return COCO's free images with label maps, in crops of 64 px."""
    small = {"crop": (64, 64), "scale": (256, 64), "val_scale": (96, 64), "batch_size": 4, "num_workers": 0}
    return SegmentationFolderDataModule(root, **small | options)


def run(folder: Path, task: Any, data: Any, **options: Any) -> TrainResult:
    """Train on two batches per epoch, validated on two."""
    return train(
        task,
        data,
        **{"folder": folder, "epochs": 2, "accelerator": "cpu", "progress": False, "export": "last"}
        | {"limit_train_batches": 2, "limit_val_batches": 2}
        | options,
    )
