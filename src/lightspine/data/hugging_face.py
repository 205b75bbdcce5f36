"""Hugging Face datasets saved with `save_to_disk`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightspine.data.class_names import encode_labels, infer_class_names
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import decode_image, open_image, read_image_file


def load_hugging_face(path: str | Path) -> Mapping[str, Any]:
    """Load a dataset saved with `save_to_disk` as split name -> split; a single split is called "train".

    Args:
        path: the folder.

    Raises:
        UsageError: the package `datasets` is not installed, or the folder is missing.
        LightspineError: the folder is not a saved dataset.
    """
    # Imported here because the package is optional.
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "expected the package datasets for Hugging Face data, but it is not installed: "
            "pip install 'lightspine[huggingface]'"
        ) from error
    if not Path(path).is_dir():
        raise UsageError(f"expected a folder written by save_to_disk, but {path} is not a folder")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise LightspineError(f"cannot load the dataset {path}: {error}") from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


class HuggingFaceSource:
    """Image source for one split of a Hugging Face dataset.

    Args:
        split: a `datasets.Dataset`.
        image_column: column of type `datasets.Image`.
        label_column: column of class indices or names.
        class_names: names in the order of the class indices, in place of those of the column.
        where: name of the split in error messages.

    Attributes:
        class_names: names in the order of the class indices.

    Raises:
        UsageError: a column is missing, or a label is not among the classes.
    """

    def __init__(
        self,
        split: Any,
        *,
        image_column: str = "image",
        label_column: str = "label",
        class_names: list[str] | None = None,
        where: str = "the dataset",
    ) -> None:
        import datasets

        for column in (image_column, label_column):
            if column not in split.column_names:
                raise UsageError(
                    f"expected a column {column} in {where}, which has {', '.join(split.column_names)}"
                )
        self.where = where
        own_names = getattr(split.features[label_column], "names", None)
        written = [
            own_names[label] if own_names and isinstance(label, int) and label >= 0 else str(label)
            for label in split[label_column]
        ]
        self.class_names = class_names or own_names or infer_class_names(written)
        self.labels = np.asarray(encode_labels(written, self.class_names, where))
        # Keep the encoded bytes, so that images are decoded as in the other image sources.
        self._column = image_column
        self._rows = split.select_columns([image_column]).cast_column(
            image_column, datasets.Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        """Return the name of the split and the row."""
        return f"{self.where}, row {position}"

    def open(self, position: int) -> Image.Image:
        """Read an image as 8-bit RGB.

        Raises:
            UsageError: the image is smaller than 32 px on a side.
            LightspineError: it cannot be read, or the row has no image.
        """
        stored = self._stored(position)
        return decode_image(stored, self.name(position)) if isinstance(stored, bytes) else open_image(stored)

    def read(self, position: int) -> bytes:
        """Read the content of an image file.

        Raises:
            LightspineError: it cannot be read, or the row has no image.
        """
        stored = self._stored(position)
        return stored if isinstance(stored, bytes) else read_image_file(stored)

    def _stored(self, position: int) -> bytes | str:
        """Return the encoded bytes of an image, or the path of its file."""
        stored = self._rows[position][self._column] or {}
        if found := stored.get("bytes") or stored.get("path"):
            return found
        raise LightspineError(f"cannot read image {self.name(position)}: the row has no image")
