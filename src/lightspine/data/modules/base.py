"""Base LightningDataModule: data loaders, samplers and the log of unreadable images."""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightspine.data.bad_images import BadImage, BadImageLog
from lightspine.data.class_names import similar_class_names
from lightspine.data.dataset import Batch, collate_images
from lightspine.data.loader import ResumableLoader, SeededDataset
from lightspine.data.samplers import EpochSampler
from lightspine.data.split_record import SplitRecord, record_split
from lightspine.data.transforms import Preprocessing
from lightspine.errors import UsageError

_log = logging.getLogger(__name__)


class ImageDataModule(pl.LightningDataModule):
    """Base class of all data modules: batches, class names and preprocessing for the training tasks.

    Args:
        class_names: names in the order of the class indices.
        preprocessing: preprocessing of the images; it is saved with the model.
        batch_size: images per step and device.
        num_workers: number of worker processes; 0 reads in the training process.
        seed: seed of the order and the augmentation of the images, together with the epoch.
        repeats: copies of an image in a batch with different augmentations (repeated augmentation); an epoch
            has as many steps as without. DeiT, Vim and SHViT use 3.
        images_per_epoch: number of images of a training epoch, over all devices: a small dataset is repeated
            with other augmentations, a large one is spread over several epochs, so that the length of a run
            does not depend on the size of the dataset. Default: every image once.
        max_bad_share: largest share of an epoch's images that may be unreadable before the run stops.

    Raises:
        UsageError: a value out of range.
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
        images_per_epoch: int | None = None,
        max_bad_share: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("repeats", repeats, 1),
            ("images_per_epoch", images_per_epoch, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"expected a {name} of at least {least}, got {value}")
        for similar in similar_class_names(class_names):
            _log.warning("the classes %s differ only in case: are they one class?", " and ".join(similar))
        self.class_names = class_names
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.repeats = repeats
        self.images_per_epoch = images_per_epoch
        # Share that was held out of a folder without splits.
        self.val_fraction: float | None = None
        self._split_record: SplitRecord | None = None
        self._bad_images = {stage: BadImageLog(max_bad_share) for stage in ("train", "val")}
        self._counted_epoch: dict[str, int] = {}
        self._epoch_images: dict[str, int] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def split_record(self) -> SplitRecord | None:
        """Return the record of the training and validation images, or `None` for data without names."""
        if self._split_record is None and (images := self._split_images()) is not None:
            _warn_of_shared_images(*images)
            self._split_record = record_split(*images, val_fraction=self.val_fraction, seed=self.seed)
        return self._split_record

    def _split_images(self) -> tuple[Sequence[str], Sequence[str]] | None:
        """Return the names of the training and validation images, if they have names."""
        return None

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:  # noqa: ARG002
        """Count the unreadable images of a batch; Lightning calls this for every batch.

        Raises:
            LightspineError: more than `max_bad_share` of the epoch's images are unreadable.
        """
        self._count_bad_images(batch.bad)
        return batch

    def _count_bad_images(self, bad: Iterable[BadImage]) -> None:
        """Count unreadable images of the running epoch, each once.

        Raises:
            LightspineError: more than `max_bad_share` of the epoch's images are unreadable.
        """
        stage = "train" if self.trainer is not None and self.trainer.training else "val"
        if self.trainer is not None and stage in self._epoch_images:
            epoch = self.trainer.current_epoch
            if self._counted_epoch.get(stage) != epoch:
                self._counted_epoch[stage] = epoch
                self._bad_images[stage].start_epoch(self._epoch_images[stage])
            self._bad_images[stage].add(bad)

    def _train_loader(self, dataset: Dataset, collate: Any = collate_images) -> DataLoader:
        """Create a shuffled loader whose augmentation depends on (seed, epoch, image) alone."""
        sampler = self._create_sampler(
            dataset, "train", repeats=self.repeats, epoch_size=self.images_per_epoch
        )
        # BatchNorm of a 1 x 1 map fails on a batch of one image, which the last batch may be.
        return self._create_loader(
            SeededDataset(dataset, self.seed), sampler, collate, drop_last=len(sampler) >= self.batch_size
        )

    def _val_loader(self, dataset: Dataset, collate: Any = collate_images) -> DataLoader:
        # All ranks get the same number of images, or a sharded model would deadlock; a few images may be
        # counted twice.
        return self._create_loader(dataset, self._create_sampler(dataset, "val", shuffle=False), collate)

    def _create_sampler(self, dataset: Any, stage: str, **options: Any) -> EpochSampler:
        trainer = self.trainer
        sampler = EpochSampler(
            len(dataset),
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
            **options,
        )
        self._epoch_images[stage] = -(-len(sampler) // sampler.repeats)
        return sampler

    def _create_loader(
        self, dataset: Dataset, sampler: EpochSampler, collate: Any, **options: Any
    ) -> DataLoader:
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


def _warn_of_shared_images(train: Sequence[str], val: Sequence[str]) -> None:
    """Log a warning if images to validate on are training images too, whose scores would be too good."""
    held_out = set(map(os.path.normpath, val))
    shared = sorted(held_out.intersection(map(os.path.normpath, train)))
    if shared:
        _log.warning(
            "%d of %d validation images are training images too, first %s", len(shared), len(val), shared[0]
        )
