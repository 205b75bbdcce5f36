"""Data modules for semantic segmentation."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from lightspine.data.detection import (
    VAL_COCO_SPLITS,
    CocoAnnotations,
    coco_paths,
    find_train_split,
    hold_out,
    list_coco_splits,
    read_coco,
)
from lightspine.data.modules.base import ImageDataModule
from lightspine.data.modules.detection import log_issues
from lightspine.data.segmentation import (
    IGNORED,
    CocoSemanticLabels,
    LabeledImage,
    LabelMapSource,
    SegmentationDataset,
    check_label_values,
    collate_segmentation,
    collate_segmentation_lists,
    create_segmentation_eval_transform,
    create_segmentation_transform,
    scan_segmentation_folder,
)
from lightspine.data.split_names import find_split
from lightspine.data.transforms import Preprocessing

_log = logging.getLogger(__name__)


class SegmentationDataModule(ImageDataModule):
    """Base class of the segmentation data modules, which pass their `**options` on to it.

    Args:
        train: training pairs and the reader of their label maps.
        val: validation pairs and the reader of their label maps.
        class_names: names in the order of the class indices.
        crop: height and width of the training images in pixels.
        scale: shorter and longer side of the rectangle into which images are resized.
        ratio: smallest and largest random factor of that rectangle in training.
        largest_share: largest share of a crop's labeled pixels that one class may fill (mmseg's
            cat_max_ratio).
        hflip: probability of a horizontal flip.
        photometric: random photometric distortion: brightness, contrast, saturation and hue.
        val_scale: shorter and longer side of the rectangle into which images are resized in validation and by
            later commands; "scale" (the default) is that of the training, `None` keeps their size.
        val_divisor: sides of validation images are rounded up to multiples of it.
        batch_size: images per step and device.
        num_workers: number of worker processes; 0 reads in the training process.
        preprocessing: `mean` and `std` as in timm's pretrained cfgs; default: ImageNet's.
        seed: seed of the order and the augmentation of the images.
        images_per_epoch: number of images of a training epoch; see `ImageDataModule`.
        max_bad_share: largest share of an epoch's images that may be unreadable before the run stops.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        train: tuple[Sequence[LabeledImage], LabelMapSource],
        val: tuple[Sequence[LabeledImage], LabelMapSource],
        class_names: list[str],
        *,
        crop: tuple[int, int] = (512, 512),
        scale: tuple[int, int] = (512, 2048),
        ratio: tuple[float, float] = (0.5, 2.0),
        largest_share: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        val_scale: tuple[int, int] | Literal["scale"] | None = "scale",
        val_divisor: int = 1,
        batch_size: int = 4,
        num_workers: int = 2,
        preprocessing: dict[str, Any] | None = None,
        seed: int = 0,
        images_per_epoch: int | None = None,
        max_bad_share: float = 0.1,
    ) -> None:
        found = Preprocessing.from_config(preprocessing or {})
        super().__init__(
            class_names,
            found,
            batch_size,
            num_workers,
            seed,
            images_per_epoch=images_per_epoch,
            max_bad_share=max_bad_share,
        )
        self.val_scale = scale if val_scale == "scale" else val_scale
        if self.val_scale is None or sorted(self.val_scale) != sorted(scale):
            _log.info(
                "images are resized to %s px in training (scale), but %s in validation and later commands",
                list(scale),
                "keep their size" if self.val_scale is None else f"to {list(self.val_scale)} px",
            )
        self.val_divisor = val_divisor
        # Label map settings that an evaluation of the checkpoint needs, besides the class names.
        self.reading: dict[str, Any] = {}
        # Created here, so that an invalid setting is reported before training starts.
        self._train = SegmentationDataset(
            *train,
            create_segmentation_transform(
                found,
                crop=crop,
                scale=scale,
                ratio=ratio,
                largest_share=largest_share,
                hflip=hflip,
                photometric=photometric,
            ),
            replace_bad=True,
        )
        self._val = SegmentationDataset(
            *val, create_segmentation_eval_transform(found, scale=self.val_scale, divisor=val_divisor)
        )

    def _split_images(self) -> tuple[Sequence[str], Sequence[str]]:
        return list(self._train.images), list(self._val.images)

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, images (N, 3, H, W) and labels (N, H, W); see `SegmentationBatch`."""
        return self._train_loader(self._train, collate_segmentation)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches, with images and labels in lists."""
        return self._val_loader(self._val, collate_segmentation_lists)


class SegmentationFolderDataModule(SegmentationDataModule):
    """Segmentation folder: `images/train/*` and `annotations/train/*.png`, and the same for `val`.

    Args:
        root: the folder; see `lightspine.data.segmentation.scan_segmentation_folder`.
        class_names: file with one class name per line; default: `classes.txt` in the folder.
        num_classes: number of classes if there is no file with their names; default: found in the label maps.
        ignored: value of unlabeled pixels in the label maps (ignore index).
        remap: value in the label maps -> class index, or 255 to ignore it.
        val_fraction: share of the images for validation if the folder has no validation images.
        seed: seed of the split and of the order and the augmentation of the images.
        **options: see `SegmentationDataModule`.

    Raises:
        UsageError: see `scan_segmentation_folder`; a value out of range.
        LightspineError: the class names cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        class_names: str | Path | None = None,
        num_classes: int | None = None,
        ignored: int | None = IGNORED,
        remap: Mapping[int, int] | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
        **options: Any,
    ) -> None:
        splits = scan_segmentation_folder(
            root,
            class_names=class_names,
            num_classes=num_classes,
            ignored=ignored,
            remap=remap,
            val_fraction=val_fraction,
            seed=seed,
        )
        super().__init__(
            (splits.train, splits.reader),
            (splits.val, splits.reader),
            splits.class_names,
            seed=seed,
            **options,
        )
        self.val_fraction = val_fraction
        self.reading = {"ignored": ignored, "remap": None if remap is None else dict(remap)}


class CocoSemanticDataModule(SegmentationDataModule):
    """Semantic segmentation on COCO masks: class 0 is the background, then the classes of the file.

    Args:
        root: the folder; see `lightspine.data.detection.list_coco_splits`.
        train: name of the training split; default: the first of train2017, train and training, in any case,
            or the only split.
        val: name of the validation split; default: the first of val2017, val, validation, valid, test and
            testing.
        val_fraction: share of the training images for validation if there is no validation split.
        seed: seed of the order and the augmentation of the images.
        **options: see `SegmentationDataModule`.

    Raises:
        UsageError: see `read_coco`; too many classes; a value out of range.
        LightspineError: a file cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str | None = None,
        val: str | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
        **options: Any,
    ) -> None:
        def read(split: str, class_names: list[str] | None = None) -> CocoAnnotations:
            annotations = read_coco(*coco_paths(root, split), class_names=class_names)
            log_issues(split, annotations)
            return annotations

        train = train or find_train_split(root)
        val = val or find_split(list_coco_splits(root), VAL_COCO_SPLITS, root)
        annotations = read(train)
        if val is None:
            annotations, held_out = hold_out(annotations, val_fraction, seed)
        else:
            held_out = read(val, annotations.class_names)
        train_labels, val_labels = CocoSemanticLabels(annotations), CocoSemanticLabels(held_out)
        check_label_values(train_labels, train_labels.pairs())
        super().__init__(
            (train_labels.pairs(), train_labels),
            (val_labels.pairs(), val_labels),
            train_labels.class_names,
            seed=seed,
            **options,
        )
        self.val_fraction = val_fraction
