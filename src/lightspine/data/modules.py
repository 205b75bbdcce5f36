"""The data sets as Lightning data modules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightspine.data.digits import CLASS_NAMES, DigitsDataset, digits_preprocessing
from lightspine.data.image_folder import ImageFolderDataset, collate_images, scan_image_folder
from lightspine.data.images import MIN_SIDE
from lightspine.data.transforms import (
    Augmentation,
    Preprocessing,
    create_eval_transform,
    create_train_transform,
)
from lightspine.errors import UsageError


class LazyLoader(DataLoader):
    """A data loader that begins at the first batch and not at `iter()`.

    Lightning calls `iter()` before it has restored the epoch of a resumed run and told it to the sampler; a
    plain loader with workers has by then drawn its seed and asked for the images of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own class
        """Yield the batches."""
        yield from super().__iter__()


class ImageDataModule(pl.LightningDataModule):
    """What the classification task needs of its data: batches, class names and the preprocessing.

    Args:
        class_names: the classes in the order of their numbers.
        preprocessing: how an image becomes an input; is saved with the model.
        batch_size: images per step and device.
        num_workers: processes that read images; 0 reads in the training process.
        seed: order of the images, together with the epoch.
    """

    def __init__(
        self,
        class_names: list[str],
        preprocessing: Preprocessing,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1, got {batch_size}")
        self.class_names = class_names
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def _train_loader(self, dataset: Dataset, collate: Any) -> DataLoader:
        trainer = self.trainer
        # Its order depends on (seed, epoch) alone, on one device too: a resumed run sees the same images.
        sampler: DistributedSampler = DistributedSampler(
            dataset,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
        )
        # A last batch of one image would stop batch normalisation on a 1 x 1 map.
        return self._loader(dataset, collate, sampler=sampler, drop_last=len(sampler) >= self.batch_size)

    def _loader(self, dataset: Dataset, collate: Any, **options: Any) -> DataLoader:
        # Workers are started anew in every epoch: only then are their random numbers those of the epoch.
        return LazyLoader(
            dataset,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            **options,
        )


class DigitsDataModule(ImageDataModule):
    """scikit-learn's handwritten digits with a fixed held-out test split; needs no download.

    Args:
        image_size: height and width in pixels that the 8 x 8 px digits are scaled to, at least 32.
        batch_size: digits per step and device.
        augment: turn, scale and shift the training digits at random.
        seed: order of the digits, together with the epoch; the split is always the same.
    """

    def __init__(
        self, image_size: int = 32, batch_size: int = 64, augment: bool = True, seed: int = 0
    ) -> None:
        super().__init__(CLASS_NAMES, digits_preprocessing(image_size), batch_size, 0, seed)
        self.image_size = image_size
        self.augment = augment

    def train_dataloader(self) -> DataLoader:
        """Return batches (images (N, 3, S, S), labels (N,), [])."""
        dataset = DigitsDataset("train", image_size=self.image_size, augment=self.augment)
        return self._train_loader(dataset, _as_is)

    def val_dataloader(self) -> DataLoader:
        """Return the held-out digits in batches (images (N, 3, S, S), labels (N,), [])."""
        return self._loader(DigitsDataset("test", image_size=self.image_size), _as_is)


class ImageFolderDataModule(ImageDataModule):
    """Images of a folder `train/CLASS/*` and `val/CLASS/*`, or `CLASS/*` with a share held out.

    Args:
        root: the folder.
        image_size: height and width in pixels, at least 32; the preprocessing's own without it.
        batch_size: images per step and device.
        augmentation: "none", "light", "medium" or "strong", see `create_train_transform`.
        val_fraction: share of every class that is held out where the folder has no `val`.
        num_workers: processes that read images; 0 reads in the training process.
        seed: order of the images and choice of the held-out ones.
        preprocessing: a mapping as in timm's pretrained cfgs; ImageNet's usual values without it.

    Raises:
        UsageError: what `scan_image_folder` refuses, or an image size below 32.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        batch_size: int = 32,
        augmentation: Augmentation = "medium",
        val_fraction: float = 0.2,
        num_workers: int = 2,
        seed: int = 0,
        preprocessing: dict[str, Any] | None = None,
    ) -> None:
        if image_size is not None and image_size < MIN_SIDE:
            raise UsageError(f"expected an image size of at least {MIN_SIDE} px, got {image_size}")
        self.splits = scan_image_folder(root, val_fraction=val_fraction, seed=seed)
        super().__init__(
            self.splits.class_names,
            Preprocessing.from_config(preprocessing or {}, image_size=image_size),
            batch_size,
            num_workers,
            seed,
        )
        self.augmentation = augmentation

    def train_dataloader(self) -> DataLoader:
        """Return batches (images (N, 3, H, W), labels (N,), skipped images); N is constant."""
        transform = create_train_transform(self.preprocessing, self.augmentation)
        dataset = ImageFolderDataset(self.splits.train, transform, replace_bad=True)
        return self._train_loader(dataset, collate_images)

    def val_dataloader(self) -> DataLoader:
        """Return the held-out images in batches (images (N, 3, H, W), labels (N,), skipped images)."""
        dataset = ImageFolderDataset(self.splits.val, create_eval_transform(self.preprocessing))
        return self._loader(dataset, collate_images)


def _as_is(batch: Any) -> Any:
    return batch
