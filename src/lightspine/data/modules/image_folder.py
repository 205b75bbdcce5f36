"""A folder of images for training."""

from pathlib import Path
from typing import Any

from lightspine.data.image_folder import FileSource, scan_image_folder
from lightspine.data.modules.base import SourceDataModule


class ImageFolderDataModule(SourceDataModule):
    """Images of a folder `train/CLASS/*` and `val/CLASS/*`, or `CLASS/*` with a share held out.

    Args:
        root: the folder.
        val_fraction: share of every class that is held out where the folder has no `val`.
        val_split: name of the folder to validate on; without it the first of val, validation, valid and test.
        seed: order and augmentation of the images and choice of the held-out ones.
        **options: see `SourceDataModule`.

    Raises:
        UsageError: what `scan_image_folder` refuses, or a value out of its range.
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
