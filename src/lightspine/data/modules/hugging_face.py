"""Hugging Face data sets on disk for training."""

from pathlib import Path
from typing import Any

from lightspine.data.class_names import check_class_count
from lightspine.data.hugging_face import HuggingFaceSource, load_hugging_face
from lightspine.data.image_folder import TRAIN_NAME, VAL_NAMES
from lightspine.data.modules.base import SourceDataModule
from lightspine.errors import UsageError


class HuggingFaceDataModule(SourceDataModule):
    """A data set that `datasets.Dataset.save_to_disk` wrote; needs the package `datasets`.

    Args:
        path: the folder.
        train_split: the split to train on.
        val_split: the split to validate on; without it the first of val, validation, valid and test.
        image_column: a column of the type `datasets.Image`.
        label_column: a column of class numbers or names.
        seed: order and augmentation of the images, together with the epoch.
        **options: see `SourceDataModule`.

    Raises:
        UsageError: `datasets` is not installed; a missing split or column; a value out of its range.
        LightspineError: the folder cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        train_split: str = TRAIN_NAME,
        val_split: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        seed: int = 0,
        **options: Any,
    ) -> None:
        splits = load_hugging_face(path)
        val_split = val_split or next((name for name in VAL_NAMES if name in splits), "val")
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
