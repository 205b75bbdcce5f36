"""What every data module does alike: transforms, loaders, and the count of images that cannot be used."""

from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightspine.data.augmentation import Augmentation, AugmentationName
from lightspine.data.bad_images import BadImageCounter
from lightspine.data.batch import Batch, collate_images
from lightspine.data.dataset import ImageDataset, ImageSource
from lightspine.data.images import MIN_SIDE
from lightspine.data.loader import ResumableLoader
from lightspine.data.sampling import EpochSampler
from lightspine.data.seeding import SeededDataset
from lightspine.data.transforms import Preprocessing, create_eval_transform, create_train_transform
from lightspine.errors import UsageError

CropMode = Literal["center", "squash", "border"]


class ImageDataModule(pl.LightningDataModule):
    """What the classification task needs of its data: batches, class names and the preprocessing.

    Args:
        class_names: the classes in the order of their numbers.
        preprocessing: how an image becomes an input; is saved with the model.
        batch_size: images per step and device.
        num_workers: processes that read images; 0 reads in the training process.
        seed: order and augmentation of the images, together with the epoch.
        repeats: how often an image is in a batch, each time augmented anew; an epoch has as many steps as
            without. 3 is the repeated augmentation of DeiT, Vim and SHViT.
        max_bad_share: largest share of an epoch's images that may be unusable before the run stops.

    Raises:
        UsageError: a value out of its range.
    """

    def __init__(
        self,
        class_names: list[str],
        preprocessing: Preprocessing,
        batch_size: int,
        num_workers: int,
        seed: int,
        *,
        repeats: int = 1,
        max_bad_share: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("repeats", repeats, 1),
        ):
            if value < least:
                raise UsageError(f"expected a {name} of at least {least}, got {value}")
        self.class_names = class_names
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.repeats = repeats
        self._counters = {stage: BadImageCounter(max_bad_share) for stage in ("train", "val")}
        self._counted: dict[str, int] = {}
        self._lengths: dict[str, int] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Count the images of a batch that could not be used; Lightning calls this for every batch.

        Raises:
            LightspineError: they are more than `max_bad_share` of the epoch's.
        """
        stage = "train" if self.trainer is not None and self.trainer.training else "val"
        if self.trainer is not None and stage in self._lengths:
            epoch = self.trainer.current_epoch
            if self._counted.get(stage) != epoch:
                self._counted[stage] = epoch
                self._counters[stage].start(self._lengths[stage])
            self._counters[stage].add(batch.bad)
        return batch

    def _train_loader(self, dataset: Dataset, collate: Any = collate_images) -> DataLoader:
        """Return a shuffled loader whose images are augmented as a function of (seed, epoch, image)."""
        sampler = self._sampler(dataset, "train", repeats=self.repeats)
        # A last batch of one image would stop batch normalisation on a 1 x 1 map.
        return self._loader(
            SeededDataset(dataset, self.seed), sampler, collate, drop_last=len(sampler) >= self.batch_size
        )

    def _val_loader(self, dataset: Dataset, collate: Any = collate_images) -> DataLoader:
        # Every process gets equally many images, or a sharded model would wait for ever: where they cannot be
        # shared evenly a few are counted twice.
        return self._loader(dataset, self._sampler(dataset, "val", shuffle=False), collate)

    def _sampler(self, dataset: Any, stage: str, **options: Any) -> EpochSampler:
        trainer = self.trainer
        sampler = EpochSampler(
            len(dataset),
            replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
            **options,
        )
        self._lengths[stage] = -(-len(sampler) // sampler.repeats)
        return sampler

    def _loader(self, dataset: Dataset, sampler: EpochSampler, collate: Any, **options: Any) -> DataLoader:
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class SourceDataModule(ImageDataModule):
    """Training and validation images of two sources; the readers pass what they do not know on to it.

    Args:
        train: the training images.
        val: the validation images.
        class_names: the classes in the order of their numbers.
        seed: order and augmentation of the images, together with the epoch.
        image_size: height and width in pixels, at least 32; the preprocessing's own without it.
        batch_size: images per step and device.
        augmentation: "none", "light", "medium" or "strong", or the fields of `Augmentation`.
        repeats: how often an image is in a batch, each time augmented anew; an epoch has as many steps as
            without. 3 is the repeated augmentation of DeiT, Vim and SHViT.
        num_workers: processes that read images; 0 reads in the training process.
        preprocessing: a mapping as in timm's pretrained cfgs; ImageNet's usual values without it.
        crop_pct: the input's side as a share of the resized image's in the validation; the preprocessing's
            own, 0.875 in the published recipes, without it.
        crop_mode: "center" (resize the shorter side, crop the middle), "squash" (resize both sides alike,
            whatever the ratio) or "border" (resize the longer side, pad); the preprocessing's own without it.
        max_bad_share: largest share of an epoch's images that may be unusable before the run stops.

    Raises:
        UsageError: a value out of its range, an image size below 32.
    """

    def __init__(
        self,
        train: ImageSource,
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
    ) -> None:
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
        # Made once here, so that a wrong setting is refused before training starts.
        self._transforms = create_train_transform(found, augmentation), create_eval_transform(found)

    def train_dataloader(self) -> DataLoader:
        """Return batches (images (N, 3, H, W), labels (N,), skipped images); N is constant."""
        return self._train_loader(ImageDataset(self.train_source, self._transforms[0], replace_bad=True))

    def val_dataloader(self) -> DataLoader:
        """Return the validation images in batches (images (N, 3, H, W), labels (N,), skipped images)."""
        return self._val_loader(ImageDataset(self.val_source, self._transforms[1]))
