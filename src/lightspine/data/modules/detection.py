"""Data module for detection with COCO files."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightspine.data.detection import (
    TRAIN_COCO_SPLITS,
    VAL_COCO_SPLITS,
    AspectRatioSampler,
    CocoAnnotations,
    DetectionAugmentation,
    DetectionDataset,
    coco_paths,
    collate_detection,
    create_detection_transform,
    find_train_split,
    hold_out,
    list_coco_splits,
    read_coco,
    select_for_training,
)
from lightspine.data.modules.base import ImageDataModule
from lightspine.data.samplers import EpochSampler
from lightspine.data.split_names import find_split
from lightspine.data.transforms import Preprocessing

_log = logging.getLogger(__name__)


class CocoDataModule(ImageDataModule):
    """COCO dataset: `annotations/instances_SPLIT.json` with the images in `SPLIT/`, or Roboflow's layout.

    Trains on the images that have objects, without crowds, in batches of similar aspect ratio; validates on
    all images at their own size. Problems in an annotation file are repaired or skipped, counted and logged.

    Args:
        root: the folder; see `lightspine.data.detection.list_coco_splits`.
        train: name of the training split; default: the first of train2017, train and training, in any case,
            or the only split.
        val: name of the validation split; default: the first of val2017, val, validation, valid, test and
            testing.
        val_fraction: share of the training images for validation if there is no validation split.
        train_annotations: annotation file of the training split, if it is elsewhere.
        train_images: image folder of the training split, if it is elsewhere.
        val_annotations: annotation file of the validation split, if it is elsewhere.
        val_images: image folder of the validation split, if it is elsewhere.
        masks: read the masks, for detectors with a mask head.
        augmentation: "none", "flip", "multi_scale" or "large_scale_jitter", see
            `lightspine.data.detection.create_detection_transform`.
        shorter: length in pixels of the shorter side of a training image.
        longest: largest length in pixels of the longer side.
        size: side in pixels of the square that large-scale jitter produces. The size of the training images
            is also that of the validation and of later commands, see `resize`.
        batch_size: images per step and device.
        num_workers: number of worker processes; 0 reads in the training process.
        seed: seed of the order and the augmentation of the images.
        images_per_epoch: number of images of a training epoch; see `ImageDataModule`.
        max_bad_share: largest share of an epoch's images that may be unreadable before the run stops.

    Attributes:
        train_annotations: images and objects to train on.
        val_annotations: images and objects to validate on.
        resize: shorter side and maximum longer side in pixels of the training images.

    Raises:
        UsageError: see `read_coco`; no image with objects; a value out of range.
        LightspineError: a file cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str | None = None,
        val: str | None = None,
        val_fraction: float = 0.2,
        train_annotations: str | Path | None = None,
        train_images: str | Path | None = None,
        val_annotations: str | Path | None = None,
        val_images: str | Path | None = None,
        masks: bool = True,
        augmentation: DetectionAugmentation = "flip",
        shorter: int = 800,
        longest: int = 1333,
        size: int = 1024,
        batch_size: int = 2,
        num_workers: int = 2,
        seed: int = 0,
        images_per_epoch: int | None = None,
        max_bad_share: float = 0.1,
    ) -> None:
        self._transform = create_detection_transform(
            augmentation, shorter=shorter, longest=longest, size=size
        )

        def read(split: str, file: str | Path | None, folder: str | Path | None, **options: Any) -> Any:
            default_file, default_folder = coco_paths(root, split)
            annotations = read_coco(file or default_file, folder or default_folder, masks=masks, **options)
            log_issues(split, annotations)
            return annotations

        # Split names are not needed for files that are elsewhere.
        if train is None and train_annotations is None:
            train = find_train_split(root)
        if val is None and val_annotations is None:
            val = find_split(list_coco_splits(root), VAL_COCO_SPLITS, root)
        self.masks = masks
        everything = read(train or TRAIN_COCO_SPLITS[0], train_annotations, train_images)
        names = everything.class_names
        if val is None and val_annotations is None:
            everything, held_out = hold_out(everything, val_fraction, seed)
        else:
            held_out = read(val or VAL_COCO_SPLITS[0], val_annotations, val_images, class_names=names)
        self._train_files = _image_paths(everything)
        self.train_annotations: CocoAnnotations = select_for_training(everything)
        self.val_annotations: CocoAnnotations = held_out
        self.resize = (size, size) if augmentation == "large_scale_jitter" else (shorter, longest)
        # Detectors normalize their images themselves.
        super().__init__(
            names,
            Preprocessing(),
            batch_size,
            num_workers,
            seed,
            images_per_epoch=images_per_epoch,
            max_bad_share=max_bad_share,
        )
        self.val_fraction = val_fraction

    def _split_images(self) -> tuple[Sequence[str], Sequence[str]]:
        return self._train_files, _image_paths(self.val_annotations)

    def train_dataloader(self) -> DataLoader:
        """Return the training batches (`lightspine.data.detection.DetectionBatch`)."""
        dataset = DetectionDataset(self.train_annotations, self._transform, replace_bad=True)
        return self._train_loader(dataset, collate_detection)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches, with images at their own size."""
        return self._val_loader(DetectionDataset(self.val_annotations), collate_detection)

    def _create_sampler(self, dataset: Any, stage: str, **options: Any) -> EpochSampler:
        if stage != "train":
            return super()._create_sampler(dataset, stage, **options)
        trainer = self.trainer
        sampler = AspectRatioSampler(
            self.train_annotations.aspect_ratios,
            self.batch_size,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
            epoch_size=self.images_per_epoch,
        )
        self._epoch_images[stage] = len(sampler)
        return sampler


def _image_paths(annotations: CocoAnnotations) -> list[str]:
    return [str(annotations.path(position)) for position in range(len(annotations))]


def log_issues(split: str, annotations: CocoAnnotations) -> None:
    """Log a warning with the problems of a split's annotation file, if there are any."""
    if annotations.issues:
        _log.warning("%s: %s", split, annotations.issues)
