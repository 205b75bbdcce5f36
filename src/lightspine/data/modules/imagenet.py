"""ImageNet in its official layout for training."""

from pathlib import Path
from typing import Any

from lightspine.data.image_folder import FileSource
from lightspine.data.imagenet import scan_imagenet
from lightspine.data.modules.base import SourceDataModule


class ImageNetDataModule(SourceDataModule):
    """ImageNet: `train/n01440764/*`, and `val` in the same folders or flat with a list of classes.

    Args:
        root: the folder with `train` and `val`.
        val_list: the classes of a flat `val`, see `list_imagenet_val`; looked for in `root` without it.
        seed: order and augmentation of the images, together with the epoch.
        **options: see `SourceDataModule`.

    Raises:
        UsageError: what `scan_imagenet` refuses, or a value out of its range.
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
