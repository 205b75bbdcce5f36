"""Classification data modules: image folders, lists, ImageNet, shards, Hugging Face datasets, digits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from lightspine.data.class_names import (
    check_class_count,
    encode_labels,
    infer_class_names,
    read_class_names,
)
from lightspine.data.dataset import EncodedImageSource, ImageDataset, ImageSource
from lightspine.data.digits import CLASS_NAMES, DigitsDataset, digits_preprocessing
from lightspine.data.gpu_decoding import (
    DECODE_DEVICES,
    DecodeDevice,
    EncodedBatch,
    EncodedImageDataset,
    JpegDecoder,
    collate_encoded,
)
from lightspine.data.hugging_face import HuggingFaceSource, load_hugging_face
from lightspine.data.image_folder import FileSource, scan_image_folder
from lightspine.data.image_list import split_image_list
from lightspine.data.imagenet import scan_imagenet
from lightspine.data.modules.base import ImageDataModule
from lightspine.data.shards import ShardSource
from lightspine.data.split_names import TRAIN_SPLITS, VAL_SPLITS, find_split
from lightspine.data.transforms import (
    Augmentation,
    AugmentationName,
    Preprocessing,
    create_batch_transform,
    create_eval_transform,
    create_train_transform,
)
from lightspine.errors import UsageError
from lightspine.utils.image_files import MIN_SIDE

CropMode = Literal["center", "squash", "border"]


class ClassificationDataModule(ImageDataModule):
    """Base class of the classification data modules, which pass their `**options` on to it.

    Args:
        train: the training images.
        val: the validation images.
        class_names: names in the order of the class indices.
        seed: seed of the order and the augmentation of the images, together with the epoch.
        image_size: height and width in pixels, at least 32; default: that of the preprocessing.
        batch_size: images per step and device.
        augmentation: "none", "light", "medium" or "strong", or the fields of `Augmentation`.
        repeats: copies of an image in a batch with different augmentations (repeated augmentation); an epoch
            has as many steps as without. DeiT, Vim and SHViT use 3.
        num_workers: number of worker processes; 0 reads in the training process.
        preprocessing: mapping as in timm's pretrained cfgs; default: ImageNet's usual values.
        crop_pct: side of the validation crop as a share of the resized image; default: that of the
            preprocessing, 0.875 in the published recipes.
        crop_mode: "center" (resize the shorter side, center crop), "squash" (resize both sides, changing the
            aspect ratio) or "border" (resize the longer side, pad); default: that of the preprocessing.
        max_bad_share: largest share of an epoch's images that may be unreadable before the run stops.
        decode: where JPEGs are decoded for training: "cpu" (in the workers) or "cuda" (by nvJPEG, which also
            moves crop, flip, color jitter and normalization to the device); see
            `lightspine.data.gpu_decoding`. The validation images are always decoded by the workers.

    Attributes:
        jpeg_decoder: decodes the training batches on the device, or `None` if the workers decode.
        batch_transform: normalizes and erases training batches after mixing; see `create_batch_transform`.

    Raises:
        UsageError: a value out of range, an image size below 32.
    """

    def __init__(
        self,
        train: EncodedImageSource,
        val: ImageSource,
        class_names: list[str],
        *,
        seed: int = 0,
        image_size: int | None = None,
        batch_size: int = 32,
        augmentation: AugmentationName | Augmentation = "medium",
        repeats: int = 1,
        num_workers: int = 2,
        preprocessing: dict[str, Any] | None = None,
        crop_pct: float | None = None,
        crop_mode: CropMode | None = None,
        max_bad_share: float = 0.1,
        decode: DecodeDevice = "cpu",
    ) -> None:
        if decode not in DECODE_DEVICES:
            raise UsageError(f"expected decode among {', '.join(DECODE_DEVICES)}, got {decode!r}")
        if image_size is not None and image_size < MIN_SIDE:
            raise UsageError(f"expected an image size of at least {MIN_SIDE} px, got {image_size}")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise UsageError(f"expected a crop_pct above 0 and at most 1, got {crop_pct}")
        found = Preprocessing.from_config(preprocessing or {}, image_size=image_size)
        found = replace(found, crop_pct=crop_pct or found.crop_pct, crop_mode=crop_mode or found.crop_mode)
        super().__init__(
            class_names, found, batch_size, num_workers, seed, repeats=repeats, max_bad_share=max_bad_share
        )
        self.train_source = train
        self.val_source = val
        self.augmentation = augmentation
        self.batch_transform = create_batch_transform(found, augmentation)
        # Created here, so that an invalid setting is reported before training starts.
        self._transforms = create_train_transform(found, augmentation), create_eval_transform(found)
        self.jpeg_decoder = JpegDecoder(found, augmentation) if decode == "cuda" else None

    def _split_images(self) -> tuple[Sequence[str], Sequence[str]]:
        train, val = (
            [source.name(position) for position in range(len(source))]
            for source in (self.train_source, self.val_source)
        )
        return train, val

    def train_dataloader(self) -> DataLoader:
        """Return the training batches (images (N, 3, H, W), labels (N,), skipped images); N is constant.

        The images are uint8 if the data module has a `batch_transform`. With `decode="cuda"` the batches are
        encoded: `transfer_batch_to_device` decodes them.
        """
        if self.jpeg_decoder is not None:
            dataset = EncodedImageDataset(self.train_source, self.jpeg_decoder.transform)
            return self._train_loader(dataset, collate_encoded)
        return self._train_loader(ImageDataset(self.train_source, self._transforms[0], replace_bad=True))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device; decode it there if it is encoded."""
        if self.jpeg_decoder is None or not isinstance(batch, EncodedBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        decoded = self.jpeg_decoder(batch, device)
        self._count_bad_images(decoded.bad)
        # Lightning has converted the batch to the precision of the run before, without the images.
        return decoded if self.trainer is None else self.trainer.precision_plugin.convert_input(decoded)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches (images (N, 3, H, W), labels (N,), skipped images)."""
        return self._val_loader(ImageDataset(self.val_source, self._transforms[1]))


class ImageFolderDataModule(ClassificationDataModule):
    """Image folder `train/CLASS/*` and `val/CLASS/*`, or `CLASS/*` with a share of the images for validation.

    Args:
        root: the folder.
        val_fraction: share of every class for validation if there is no `val` folder.
        val_split: name of the validation folder; default: the first of val, validation, valid and test.
        seed: seed of the split and of the order and the augmentation of the images.
        **options: see `ClassificationDataModule`.

    Raises:
        UsageError: see `scan_image_folder`; a value out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        val_fraction: float = 0.2,
        val_split: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.splits = scan_image_folder(root, val_fraction=val_fraction, seed=seed, val_split=val_split)
        super().__init__(
            FileSource(self.splits.train),
            FileSource(self.splits.val),
            self.splits.class_names,
            seed=seed,
            **options,
        )
        self.val_fraction = val_fraction


class ImageListDataModule(ClassificationDataModule):
    """Images listed in a `.csv` or `.tsv` file with path, label and optionally split.

    Args:
        file: the list, see `read_image_list`.
        root: folder of relative paths; default: the folder of the list.
        class_names: file with one class name per line; default: inferred from the labels.
        val_fraction: share of every class for validation if the list has no splits.
        val_split: name of the validation split; default: the first of val, validation, valid and test.
        seed: seed of the split and of the order and the augmentation of the images.
        **options: see `ClassificationDataModule`.

    Raises:
        UsageError: see `split_image_list`; a value out of range.
        LightspineError: the list cannot be read.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        root: str | Path | None = None,
        class_names: str | Path | None = None,
        val_fraction: float = 0.2,
        val_split: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        splits = split_image_list(
            file,
            root=root,
            class_names=class_names,
            val_fraction=val_fraction,
            seed=seed,
            val_split=val_split,
        )
        super().__init__(
            FileSource(splits.train), FileSource(splits.val), splits.class_names, seed=seed, **options
        )
        self.val_fraction = val_fraction


class ImageNetDataModule(ClassificationDataModule):
    """ImageNet: `train/n01440764/*`, and `val` with the same folders or flat with a list of classes.

    Args:
        root: folder with `train` and `val`.
        val_list: classes of a flat `val`, see `list_imagenet_val`; default: searched in `root`.
        seed: seed of the order and the augmentation of the images, together with the epoch.
        **options: see `ClassificationDataModule`.

    Raises:
        UsageError: see `scan_imagenet`; a value out of range.
        LightspineError: the list cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        val_list: str | Path | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        splits = scan_imagenet(root, val_list=val_list)
        super().__init__(
            FileSource(splits.train), FileSource(splits.val), splits.class_names, seed=seed, **options
        )


class ShardDataModule(ClassificationDataModule):
    """WebDataset shards: tar files with an image and a `cls` or `json` member per sample.

    Every rank and worker reads its own share of the images, each image once per epoch, in an order that
    depends on the seed and the epoch.

    Args:
        train: path or pattern such as "train-{000..012}.tar", a folder of `.tar` files, or several of them.
        val: the same for validation.
        class_names: file with one class name per line; default: inferred from the labels.
        label_key: key of the class in a `json` member.
        index_folder: folder for the index files of the shards; default: next to the shards.
        seed: seed of the order and the augmentation of the images, together with the epoch.
        **options: see `ClassificationDataModule`.

    Raises:
        UsageError: see `ShardSource`; a sample without a known class; a value out of range.
        LightspineError: a shard is damaged.
    """

    def __init__(
        self,
        train: str | Path | Sequence[str],
        val: str | Path | Sequence[str],
        *,
        class_names: str | Path | None = None,
        label_key: str = "label",
        index_folder: str | Path | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        sources = [
            ShardSource(shards, label_key=label_key, index_folder=index_folder) for shards in (train, val)
        ]
        written = [source.written_labels() for source in sources]
        names = read_class_names(class_names) if class_names else infer_class_names(written[0])
        check_class_count(names, str(train))
        for source, labels, where in zip(sources, written, (train, val), strict=True):
            source.labels = encode_labels(labels, names, str(where))
        super().__init__(sources[0], sources[1], names, seed=seed, **options)


class HuggingFaceDataModule(ClassificationDataModule):
    """Hugging Face dataset written by `Dataset.save_to_disk`; needs the package `datasets`.

    Args:
        path: the folder.
        train_split: name of the training split; default: train or training, in any case.
        val_split: name of the validation split; default: the first of val, validation, valid, test and
            testing.
        image_column: column of type `datasets.Image`.
        label_column: column of class indices or names.
        seed: seed of the order and the augmentation of the images, together with the epoch.
        **options: see `ClassificationDataModule`.

    Raises:
        UsageError: `datasets` is not installed; a missing split or column; a value out of range.
        LightspineError: the folder cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        train_split: str | None = None,
        val_split: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        seed: int = 0,
        **options: Any,
    ) -> None:
        splits = load_hugging_face(path)
        train_split = train_split or find_split(splits, TRAIN_SPLITS, path) or TRAIN_SPLITS[0]
        val_split = val_split or find_split(splits, VAL_SPLITS, path) or VAL_SPLITS[0]
        for name in (train_split, val_split):
            if name not in splits:
                raise UsageError(f"expected a split {name} in {path}, which has {', '.join(sorted(splits))}")
        train = HuggingFaceSource(
            splits[train_split],
            image_column=image_column,
            label_column=label_column,
            where=f"{path} ({train_split})",
        )
        val = HuggingFaceSource(
            splits[val_split],
            image_column=image_column,
            label_column=label_column,
            class_names=train.class_names,
            where=f"{path} ({val_split})",
        )
        check_class_count(train.class_names, str(path))
        super().__init__(train, val, train.class_names, seed=seed, **options)


class DigitsDataModule(ImageDataModule):
    """scikit-learn's handwritten digits with a fixed test split; needs no download.

    Args:
        image_size: height and width in pixels to which the 8 x 8 px digits are resized, at least 32.
        batch_size: digits per step and device.
        augment: rotate, scale and shift the training digits at random.
        seed: seed of the order and the augmentation, together with the epoch; the split is always the same.
    """

    def __init__(
        self, image_size: int = 32, batch_size: int = 64, augment: bool = True, seed: int = 0
    ) -> None:
        super().__init__(CLASS_NAMES, digits_preprocessing(image_size), batch_size, 0, seed)
        self.image_size = image_size
        self.augment = augment

    def train_dataloader(self) -> DataLoader:
        """Return the training batches (images (N, 3, S, S), labels (N,), [])."""
        return self._train_loader(DigitsDataset("train", image_size=self.image_size, augment=self.augment))

    def val_dataloader(self) -> DataLoader:
        """Return the test batches (images (N, 3, S, S), labels (N,), [])."""
        return self._val_loader(DigitsDataset("test", image_size=self.image_size), _return_batch)


def _return_batch(batch: Any) -> Any:
    # The dataset returns whole batches.
    return batch
