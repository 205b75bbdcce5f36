"""A list of images for training."""

from pathlib import Path
from typing import Any

from lightspine.data.image_folder import FileSource
from lightspine.data.image_list import split_image_list
from lightspine.data.modules.base import SourceDataModule


class ImageListDataModule(SourceDataModule):
    """Images that a `.csv` or `.tsv` file lists: path, label and, if wanted, split.

    Args:
        file: the list, see `read_image_list`.
        root: the folder that relative paths start from; the list's own folder without it.
        class_names: a file with one class name per line; without it the labels say what the classes are.
        val_fraction: share of every class that is held out where the list has no splits.
        val_split: the split to validate on; without it the first of val, validation, valid and test.
        seed: order and augmentation of the images and choice of the held-out ones.
        **options: see `SourceDataModule`.

    Raises:
        UsageError: what `split_image_list` refuses, or a value out of its range.
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
