"""Small folders of labeled images for all tasks, and runs that were trained on them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightspine.data.modules import CocoDataModule, ImageFolderDataModule, SegmentationFolderDataModule
from lightspine.training.classification import ClassificationTask
from lightspine.training.fit import TrainResult, train
from support.coco import content, square, write_coco
from support.dense_runs import detection_task, segmentation_task
from support.images import write_folder, write_image
from support.training import SMALL_MODEL


def write_objects(root: Path, *splits: str, count: int = 4) -> Path:
    """Write `annotations/instances_SPLIT.json` and `SPLIT/*.jpg` with one object in each image."""
    for number, split in enumerate(splits):
        objects = [square(id=place, image_id=place) for place in range(1, count + number + 1)]
        file = write_coco(root / split, content(*objects, images=count + number))
        (root / "annotations").mkdir(exist_ok=True)
        file.rename(root / "annotations" / f"instances_{split}.json")
    return root


def write_label_maps(root: Path, *, count: int = 5, class_names: bool = True) -> Path:
    """Write `images/*.jpg`, `labels/*.png` with two classes and, optionally, `classes.txt`."""
    for number in range(count):
        write_image(root / "images" / f"{number}.jpg", (90, 60, 200), size=(64, 48), seed=number)
        (root / "labels").mkdir(exist_ok=True)
        labels = np.tile(np.arange(64) > 20 + number, (48, 1)).astype(np.uint8)
        Image.fromarray(labels).save(root / "labels" / f"{number}.png")
    if class_names:
        (root / "classes.txt").write_text("sky\nsea\n")
    return root


def train_classifier(data: Path, folder: Path, *, num_workers: int = 0, **options: Any) -> TrainResult:
    """Train on colored images at 48 px, of which a part is held out, with an EMA of the weights."""
    if not data.is_dir():
        write_folder(data, count=5)
    module = ImageFolderDataModule(
        data,
        image_size=48,
        batch_size=4,
        num_workers=num_workers,
        augmentation="none",
        val_fraction=0.4,
        seed=3,
    )
    task = ClassificationTask(SMALL_MODEL, 3, warmup_epochs=0.0, ema_decay=0.5)
    return _train(task, module, folder, **options)


def train_detector(data: Path, folder: Path, **options: Any) -> TrainResult:
    """Train on images of 64 x 48 px resized to 80 x 60."""
    if not data.is_dir():
        write_objects(data, "train", "val")
    module = CocoDataModule(data, masks=False, shorter=60, longest=90, batch_size=2, num_workers=0)
    # Enough steps for scores that differ: the order of equal ones depends on rounding.
    task = detection_task(num_classes=2, resize="data", score_threshold=0.0, lr=2e-2, warmup_epochs=0.0)
    return _train(task, module, folder, **{"epochs": 4, "check_val_every_n_epoch": 4} | options)


def train_segmenter(data: Path, folder: Path, **options: Any) -> TrainResult:
    """Train on crops of images that are resized to 96 x 72 px, of which a part is held out."""
    if not data.is_dir():
        write_label_maps(data)
    module = SegmentationFolderDataModule(
        data, crop=(64, 64), scale=(72, 200), batch_size=2, num_workers=0, val_fraction=0.4, seed=3
    )
    return _train(segmentation_task(num_classes=2, ema_decay=0.5), module, folder, **options)


def _train(task: Any, data: Any, folder: Path, **options: Any) -> TrainResult:
    return train(
        task, data, **{"folder": folder, "epochs": 1, "accelerator": "cpu", "progress": False} | options
    )
