"""Class mappings from a test set's folders or images to a model's classes: ImageNet-V2, -ReaL, -A, -R."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightspine.data.image_folder import find_class_folders
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import parse_json, text_from_path
from lightspine.utils.image_files import ImageListing, list_image_files

_NUMBER = re.compile(r"(\d+)$")


class MappedImage(NamedTuple):
    """Path of an image and the class indices that count as correct."""

    path: Path
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ClassMapping:
    """Mapping from folders or images to class indices; exactly one of the attributes is set.

    Attributes:
        folders: folder name -> class index.
        folder_order: class index of each folder, in the sorted order of the folder names.
        images: file name -> correct class indices.
        image_order: correct class indices of each image; the number at the end of the file name, from 1,
            is the position in the list.
    """

    folders: Mapping[str, int] | None = None
    folder_order: Sequence[int] | None = None
    images: Mapping[str, tuple[int, ...]] | None = None
    image_order: Sequence[tuple[int, ...]] | None = None

    @property
    def candidates(self) -> tuple[int, ...] | None:
        """Class indices of the folders, ascending; `None` if labels are given per image.

        ImageNet-A and ImageNet-R have 200 of the 1000 classes, and their published scores only consider the
        logits of those.
        """
        if self.folders is not None:
            return tuple(sorted(set(self.folders.values())))
        return None if self.folder_order is None else tuple(sorted(set(self.folder_order)))

    def find(self, root: str | Path) -> list[MappedImage]:
        """List the images in a folder with their classes, sorted by path.

        Images without a correct class are left out, as in the official ReaL evaluation.

        Raises:
            UsageError: the folder is missing, has no image, or has a folder or image that is not in the
                mapping.
        """
        root = Path(root)
        if self.images is not None or self.image_order is not None:
            found = [MappedImage(path, self._image_labels(path)) for path in _all_images(root)]
            return [image for image in found if image.labels]
        names = find_class_folders(root)
        classes = self._folder_classes(root, names)
        listing = ImageListing(root)
        images = [
            MappedImage(path, (label,))
            for name, label in zip(names, classes, strict=True)
            for path in listing.list(root / name)
        ]
        listing.report()
        return images

    def _folder_classes(self, root: Path, names: list[str]) -> list[int]:
        if self.folder_order is not None:
            if len(names) != len(self.folder_order):
                raise UsageError(
                    f"expected {len(self.folder_order)} class folders in {root}, one per entry of the class "
                    f"mapping, got {len(names)}"
                )
            return list(self.folder_order)
        folders = self.folders or {}
        written = [text_from_path(name) for name in names]
        if unknown := [name for name in written if name not in folders]:
            raise UsageError(f"folder {unknown[0]} of {root} is not in the class mapping")
        return [folders[name] for name in written]

    def _image_labels(self, path: Path) -> tuple[int, ...]:
        if self.images is not None:
            name = text_from_path(path.name)
            if name not in self.images:
                raise UsageError(f"image {path} is not in the class mapping")
            return self.images[name]
        order = self.image_order or ()
        number = _NUMBER.search(path.stem)
        if number is None or not 1 <= int(number[1]) <= len(order):
            raise UsageError(
                f"expected image names that end in a number from 1 to {len(order)}, the number of entries in "
                f"the class mapping, got {path}"
            )
        return order[int(number[1]) - 1]


def load_class_mapping(path: str | Path) -> ClassMapping:
    """Read a class mapping: a JSON file of one of four forms.

    - `{"n01440764": 0, ...}`: class of each folder;
    - `[0, 1, 10, ...]`: the same, for the folders in the sorted order of their names;
    - `{"ILSVRC2012_val_00000001.JPEG": [65], ...}`: correct classes of each image;
    - `[[], [970, 795], ...]`: the same, in the order of the numbers, from 1, at the end of the image names
      (the layout of the official `real.json` of ReaL).

    Raises:
        UsageError: the file is missing or has another form.
        LightspineError: the file cannot be read or is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"expected a class mapping file, but {path} is not a file")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LightspineError(f"cannot read class mapping {path}: {error}") from error
    values = list(content.values()) if isinstance(content, dict) else content
    if isinstance(values, list) and values:
        if all(_is_class(value) for value in values):
            return (
                ClassMapping(folders=content)
                if isinstance(content, dict)
                else ClassMapping(folder_order=values)
            )
        if all(isinstance(value, list) and all(map(_is_class, value)) for value in values):
            if isinstance(content, dict):
                return ClassMapping(images={name: tuple(labels) for name, labels in content.items()})
            return ClassMapping(image_order=[tuple(labels) for labels in values])
    raise UsageError(
        f"expected class indices, or lists of them, in class mapping {path}, got {_excerpt(content)}"
    )


def _is_class(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _all_images(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UsageError(f"expected a folder of images, but {root} is not a folder")
    found = list_image_files(root)
    if not found:
        raise UsageError(f"expected a folder of images, but {root} has none")
    return found


def _excerpt(content: Any) -> str:
    text = json.dumps(content)
    return text if len(text) <= 60 else text[:57] + "..."
