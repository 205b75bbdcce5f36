"""WebDataset shards for training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightspine.data.class_names import (
    check_class_count,
    derive_class_names,
    number_labels,
    read_class_names,
)
from lightspine.data.modules.base import SourceDataModule
from lightspine.data.shards import ShardSource


class ShardDataModule(SourceDataModule):
    """Images in tar files as WebDataset writes them: an image and a `cls` or `json` member per sample.

    Each rank and worker reads its own share of the images, each image once per epoch, in an order that the
    seed and the epoch decide.

    Args:
        train: path or pattern such as "train-{000..012}.tar", a folder of `.tar` files, or several of them.
        val: the same for the validation.
        class_names: a file with one class name per line; without it the labels say what the classes are.
        label_key: the entry of a `json` member that holds the class.
        index_folder: where the indices of the shards are kept; beside the shards without it.
        seed: order and augmentation of the images, together with the epoch.
        **options: see `SourceDataModule`.

    Raises:
        UsageError: what `ShardSource` refuses, a sample without a known class, a value out of its range.
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
        names = read_class_names(class_names) if class_names else derive_class_names(written[0])
        check_class_count(names, str(train))
        for source, labels, where in zip(sources, written, (train, val), strict=True):
            source.labels = number_labels(labels, names, str(where))
        super().__init__(sources[0], sources[1], names, seed=seed, **options)
