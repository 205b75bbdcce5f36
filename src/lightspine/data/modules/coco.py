"""COCO files for training detectors."""

import logging
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightspine.data.detection import (
    AspectRatioSampler,
    CocoAnnotations,
    DetectionAugmentation,
    DetectionDataset,
    collate_detection,
    create_detection_transform,
    read_coco,
    select_trained,
)
from lightspine.data.modules.base import ImageDataModule
from lightspine.data.sampling import EpochSampler
from lightspine.data.transforms import Preprocessing

_log = logging.getLogger(__name__)


class CocoDataModule(ImageDataModule):
    """Images with objects in COCO's layout: `annotations/instances_SPLIT.json` with the images in `SPLIT/`.

    Trains on the images that have objects, crowds left out, in batches of images of alike shape; validates on
    all images at their own size. What is wrong in a file is mended or left out, counted and logged.

    Args:
        root: the folder.
        train: name of the split to train on.
        val: name of the split to validate on.
        train_annotations: the file, where it lies elsewhere.
        train_images: the folder of the images, where they lie elsewhere.
        val_annotations: likewise.
        val_images: likewise.
        masks: read the masks too, for the detectors that have a mask head.
        augmentation: "none", "flip", "multi_scale" or "large_scale_jitter", see
            `lightspine.data.detection.create_detection_transform`.
        shorter: side in pixels that the shorter side of a training image is resized to.
        longest: bound of the longer side in pixels.
        size: of the square that large-scale jitter gives, in pixels.
        batch_size: images per step and device.
        num_workers: processes that read images; 0 reads in the training process.
        seed: order and augmentation of the images.
        max_bad_share: largest share of an epoch's images that may be unusable before the run stops.

    Attributes:
        train_annotations: the images and objects to train on.
        val_annotations: those to validate on.

    Raises:
        UsageError: what `read_coco` refuses, no image with objects, or a value out of its range.
        LightspineError: a file that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str = "train2017",
        val: str = "val2017",
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
        max_bad_share: float = 0.1,
    ) -> None:
        self._transform = create_detection_transform(
            augmentation, shorter=shorter, longest=longest, size=size
        )
        root = Path(root)

        def read(split: str, file: str | Path | None, folder: str | Path | None, **options: Any) -> Any:
            found = read_coco(
                file or root / "annotations" / f"instances_{split}.json",
                folder or root / split,
                masks=masks,
                **options,
            )
            if found.problems:
                _log.warning("%s: %s", split, found.problems)
            return found

        self.masks = masks
        self.train_annotations: CocoAnnotations = select_trained(read(train, train_annotations, train_images))
        names = self.train_annotations.class_names
        self.val_annotations: CocoAnnotations = read(val, val_annotations, val_images, class_names=names)
        # A detector normalises its images itself.
        super().__init__(names, Preprocessing(), batch_size, num_workers, seed, max_bad_share=max_bad_share)

    def train_dataloader(self) -> DataLoader:
        """Return batches of images and targets (`lightspine.data.detection.DetectionBatch`)."""
        dataset = DetectionDataset(self.train_annotations, self._transform, replace_bad=True)
        return self._train_loader(dataset, collate_detection)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images at their own size, in such batches."""
        return self._val_loader(DetectionDataset(self.val_annotations), collate_detection)

    def _sampler(self, dataset: Any, stage: str, **options: Any) -> EpochSampler:
        if stage != "train":
            return super()._sampler(dataset, stage, **options)
        trainer = self.trainer
        sampler = AspectRatioSampler(
            self.train_annotations.aspect_ratios,
            self.batch_size,
            replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
        )
        self._lengths[stage] = len(sampler)
        return sampler
