"""Write converted images with objects as a COCO dataset, and check what was written."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightspine.data.class_names import find_class, read_class_names, similar_class_names
from lightspine.data.detection import coco_paths, read_coco
from lightspine.data.image_folder import draw_val_indices
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_folder, text_from_path
from lightspine.utils.issues import Issues
from lightspine.utils.progress import progress_bar

TRAIN, VAL, TEST = "train", "val", "test"
"""Splits of a converted dataset."""


@dataclass(frozen=True)
class ConvertedObject:
    """Annotated object of an image: class, box, polygon.

    Attributes:
        name: name of its class.
        box: left, top, right, bottom in pixels, inside the image.
        polygon: x1, y1, x2, y2, ... in pixels; empty for an object without a mask.
        crowd: whether training and scores ignore the object (COCO's iscrowd).
    """

    name: str
    box: tuple[float, float, float, float]
    polygon: tuple[float, ...] = ()
    crowd: bool = False


@dataclass(frozen=True)
class ConvertedImage:
    """Image of a converted dataset, with its annotated objects.

    Attributes:
        source: the image file.
        name: path of the copy, relative to the folder of the split.
        size: height and width in pixels, upright.
        objects: the objects.
    """

    source: Path
    name: str
    size: tuple[int, int]
    objects: list[ConvertedObject] = field(default_factory=list)


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        folder: the written folder.
        class_names: names of the classes.
        images: number of images of each split.
        objects: number of objects of each split, or of pixels of each class for label maps.
        issues: what was left out or changed.
    """

    folder: Path
    class_names: list[str]
    images: dict[str, int]
    objects: dict[str, int]
    issues: Issues

    def as_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-serializable dictionary."""
        return {
            "folder": str(self.folder),
            "class_names": self.class_names,
            "images": self.images,
            "objects": self.objects,
            "issues": [
                {"count": count, "kind": kind, "first": self.issues.examples[kind]}
                for kind, count in self.issues.counts.most_common()
            ],
        }


def check_folders(source: Path, out: Path) -> None:
    """Check the input and output folders of a conversion.

    Raises:
        UsageError: the input is not a folder, the output exists and is not empty, or one is inside the other.
    """
    if not source.is_dir():
        state = "is a file" if source.exists() else "does not exist"
        raise UsageError(f"expected a folder to convert, but {source} {state}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"expected a new or empty folder for the converted data, but {out} exists")
    first, second = source.resolve(), out.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise UsageError(f"expected an output folder outside {source}, got {out}")


def split_items(items: Sequence[Any], val_fraction: float, seed: int, where: Path) -> dict[str, list[Any]]:
    """Split a sequence into training and validation at random.

    Raises:
        UsageError: a fraction outside 0 to 1, or fewer than two items.
    """
    chosen = draw_val_indices(len(items), val_fraction, np.random.default_rng(seed), str(where))
    return {
        TRAIN: [item for number, item in enumerate(items) if number not in chosen],
        VAL: [item for number, item in enumerate(items) if number in chosen],
    }


def clip_box(
    corners: Sequence[float], size: tuple[int, int], where: str, issues: Issues
) -> tuple[float, float, float, float] | None:
    """Clip a box (left, top, right, bottom) to the image; `None`, counted in `issues`, if nothing is left."""
    left, top, right, bottom = corners
    height, width = size
    if right <= left or bottom <= top:
        issues.add("box without area", where)
        return None
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        issues.add("box outside the image", where)
        return None
    if left < -1 or top < -1 or right > width + 1 or bottom > height + 1:
        issues.add("box that reaches beyond the image, clipped", where)
    return max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))


def choose_classes(images: Sequence[ConvertedImage], file: str | Path | None, issues: Issues) -> list[str]:
    """Return the class names: all names of the objects, sorted, or those of a file.

    With a file, objects whose name differs from a class in case or outer spaces get the name of the class,
    and objects of other classes are left out. Without one, names that differ only in case are counted.

    Args:
        images: all images; their objects are changed.
        file: file with one class name per line.
        issues: receives what was left out or changed.
    """
    if file is None:
        names = sorted({item.name for image in images for item in image.objects})
        for similar in similar_class_names(names):
            issues.add(
                "classes whose names differ only in case; a file of class names (--classes) would join them",
                " and ".join(similar),
            )
        return names
    names = read_class_names(file)
    for image in images:
        kept = []
        for item in image.objects:
            matches = find_class(item.name, names)
            if not matches:
                issues.add(f"object of a class that is not in {file}", f"{item.name} in {image.source}")
                continue
            kept.append(replace(item, name=names[matches[0]]))
        image.objects[:] = kept
    return names


def place_file(source: Path, target: Path, *, link: bool) -> None:
    """Copy an image, or make a symbolic link to it.

    Raises:
        LightspineError: the file cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise LightspineError(f"cannot write {target}: {error.strerror or error}") from error


def write_coco_dataset(
    out: Path,
    splits: Mapping[str, Sequence[ConvertedImage]],
    class_names: Sequence[str],
    issues: Issues,
    *,
    link: bool = False,
) -> Conversion:
    """Write `annotations/instances_SPLIT.json` and the images in `SPLIT/`, and read them back.

    Args:
        out: a new or empty folder.
        splits: split name -> images; splits without images are not written.
        class_names: names in the order of the class indices.
        issues: what was left out so far.
        link: make symbolic links to the images in place of copies.

    Raises:
        UsageError: there is no image, or no object.
        LightspineError: a file cannot be written, or what was written does not read back equal.
    """
    splits = {split: images for split, images in splits.items() if images}
    for images in splits.values():
        _check_names(images)
    objects = {split: sum(len(image.objects) for image in images) for split, images in splits.items()}
    if not any(objects.values()):
        raise UsageError(f"found no object to convert: {issues}" if issues else "found no object to convert")
    with atomic_folder(out) as folder:
        for split, images in splits.items():
            file, image_folder = coco_paths(folder, split)
            file.parent.mkdir(parents=True, exist_ok=True)
            for image in progress_bar(images, f"writing {split}"):
                place_file(image.source, image_folder / image.name, link=link)
            content = json.dumps(_to_coco(images, class_names), ensure_ascii=False)
            file.write_bytes(content.encode("utf-8", "surrogateescape"))
            _check_written(folder, split, images, class_names)
    return Conversion(
        out, list(class_names), {split: len(images) for split, images in splits.items()}, objects, issues
    )


def _check_names(images: Sequence[ConvertedImage]) -> None:
    """Check that the copies of the images have different names.

    Raises:
        UsageError: two have the same name.
    """
    first: dict[str, Path] = {}
    for image in images:
        other = first.setdefault(image.name, image.source)
        if other != image.source:
            raise UsageError(
                f"expected images of different names in a split, found {other} and {image.source}"
            )


def _to_coco(images: Sequence[ConvertedImage], class_names: Sequence[str]) -> dict[str, Any]:
    numbers = {name: number for number, name in enumerate(class_names, 1)}
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, 1):
        for item in image.objects:
            left, top, right, bottom = item.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": numbers[item.name],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": _polygon_area(item.polygon) or (right - left) * (bottom - top),
                    "iscrowd": int(item.crowd),
                }
                | ({"segmentation": [list(item.polygon)]} if item.polygon else {})
            )
    return {
        "images": [
            {
                "id": number,
                "file_name": text_from_path(image.name),
                "height": image.size[0],
                "width": image.size[1],
            }
            for number, image in enumerate(images, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }


def _polygon_area(polygon: Sequence[float]) -> float:
    x, y = np.asarray(polygon[0::2]), np.asarray(polygon[1::2])
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2) if len(x) else 0.0


def _check_written(
    folder: Path, split: str, images: Sequence[ConvertedImage], class_names: Sequence[str]
) -> None:
    """Compare what the trainer reads with what was to be written.

    Raises:
        LightspineError: they differ.
    """
    masks = all(item.polygon for image in images for item in image.objects)
    found = read_coco(*coco_paths(folder, split), masks=masks, class_names=class_names)
    expected = [[item.box for item in image.objects] for image in images]
    names = [[item.name for item in image.objects] for image in images]
    equal = not found.issues and list(found.files) == [image.name.replace(os.sep, "/") for image in images]
    for position in range(len(found) if equal else 0):
        corners = np.asarray(expected[position], dtype=np.float64).reshape(-1, 4)
        labels = [class_names[found.labels[number]] for number in found.objects(position)]
        equal &= labels == names[position] and np.allclose(
            found.corners(position), corners, rtol=0, atol=1e-6
        )
    if not equal:
        raise LightspineError(f"the written split {split} does not read back equal: {found.issues}")
