"""Read and validate COCO annotation files."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightspine.data.detection.annotations import CocoAnnotations
from lightspine.data.detection.masks import check_segmentation
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.issues import Issues
from lightspine.utils.packed_strings import PackedStrings


class _Image(NamedTuple):
    name: str
    height: int
    width: int


class _Object(NamedTuple):
    box: list[float]
    label: int
    area: float
    crowd: bool
    segmentation: str


def read_coco(
    file: str | Path,
    folder: str | Path,
    *,
    masks: bool = True,
    class_names: Sequence[str] | None = None,
) -> CocoAnnotations:
    """Read a COCO file of object annotations.

    The following are skipped and recorded in `issues`: images whose file is missing; objects of unknown
    images or categories; objects whose box is not four finite numbers, has no area or lies outside the image;
    with `masks`, objects whose mask is missing, damaged, empty or of another size than the image. A missing
    area is replaced by that of the box. Images without objects are kept.

    Args:
        file: the `.json` file.
        folder: folder of the image files.
        masks: read and check the masks.
        class_names: classes of a model, in the order of its labels; default: the categories of the file, in
            the order of their ids.

    Raises:
        UsageError: the file or folder does not exist; there is no image, no category or no usable object; a
            category is not among `class_names`.
        LightspineError: the file is not JSON or not a COCO file of objects.
    """
    file, folder = Path(file), Path(folder)
    content = _read_json(file)
    if not folder.is_dir():
        raise UsageError(f"expected a folder of images, but {folder} {_describe_path(folder)}")
    issues = Issues()
    names, labels = _read_categories(content["categories"], file, class_names)
    images = _read_images(content["images"], file, folder, issues)
    objects: dict[int, list[_Object]] = {number: [] for number in images}
    known = {entry["id"] for entry in content["images"]}
    for order, entry in enumerate(content["annotations"]):
        where = f"annotation {entry.get('id', order) if isinstance(entry, dict) else order}"
        try:
            image_id = _find_image_id(entry, known)
            # Objects of a missing image file are not reported one by one.
            if image_id in images:
                objects[image_id].append(_read_object(entry, images[image_id], labels, masks, where, issues))
        except LightspineError as error:
            issues.add(str(error), where)
    if content["annotations"] and not any(objects.values()):
        raise UsageError(f"none of the {len(content['annotations'])} objects of {file} can be used: {issues}")
    return _pack_annotations(
        folder, names, _number_classes(labels, len(names)), images, objects, masks, issues
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"expected a COCO file, but {file} {_describe_path(file)}")
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise LightspineError(f"cannot read {file}: {error.strerror or error}") from error
    # UnicodeDecodeError (a ValueError) for another encoding, RecursionError for excessive nesting.
    except (ValueError, RecursionError) as error:
        raise LightspineError(f"cannot read {file}: it is not JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise LightspineError(f"{file} is not a COCO file of objects: expected a list {key!r} in it")
    return content


def _describe_path(path: Path) -> str:
    return "is a folder" if path.is_dir() else "is a file" if path.exists() else "does not exist"


def _read_categories(
    entries: list[Any], file: Path, class_names: Sequence[str] | None
) -> tuple[list[str], dict[int, int]]:
    """Return the class names and category id -> label."""
    found: dict[int, str] = {}
    for entry in entries:
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str):
            raise LightspineError(
                f"a category of {file} needs a whole number as id and a name, got {entry!r}"
            )
        if number in found:
            raise LightspineError(f"category id {number} appears twice in {file}")
        found[number] = name
    if not found:
        raise UsageError(f"expected at least one category in {file}")
    ordered = sorted(found)
    if class_names is None:
        return [found[number] for number in ordered], {number: i for i, number in enumerate(ordered)}
    for name in found.values():
        if name not in class_names:
            raise UsageError(
                f"category {name!r} of {file} is not among the model's {len(class_names)} classes"
            )
    return list(class_names), {number: class_names.index(found[number]) for number in ordered}


def _number_classes(labels: dict[int, int], count: int) -> list[int]:
    """Return the category id of every class; a class that the file lacks gets a new id."""
    of_label = {label: number for number, label in labels.items()}
    new = itertools.count(max(labels) + 1)
    return [of_label[label] if label in of_label else next(new) for label in range(count)]


def _read_images(entries: list[Any], file: Path, folder: Path, issues: Issues) -> dict[int, _Image]:
    images: dict[int, _Image] = {}
    seen: set[int] = set()
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        number, name = fields.get("id"), fields.get("file_name")
        height, width = fields.get("height"), fields.get("width")
        if type(number) is not int or not isinstance(name, str):
            raise LightspineError(
                f"an image of {file} needs a whole number as id and a file_name, got {entry!r}"
            )
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            raise LightspineError(
                f"image {name} of {file} needs a height and a width in pixels, got {height!r} and {width!r}"
            )
        if number in seen:
            raise LightspineError(f"image id {number} appears twice in {file}")
        seen.add(number)
        if (folder / name).is_file():
            images[number] = _Image(name, height, width)
        else:
            issues.add("image file missing", name)
    if not images:
        first = f", such as {issues.examples['image file missing']}" if issues else ""
        raise UsageError(f"found none of the {len(seen)} images of {file} in {folder}{first}")
    return images


def _find_image_id(entry: Any, known: set[int]) -> int:
    if not isinstance(entry, dict):
        raise LightspineError("annotation that is not a JSON object")
    image_id = entry.get("image_id")
    if type(image_id) is not int or image_id not in known:
        raise LightspineError("object of an unknown image")
    return image_id


def _read_object(
    entry: dict[str, Any],
    image: _Image,
    labels: dict[int, int],
    masks: bool,
    where: str,
    issues: Issues,
) -> _Object:
    category, box, area = entry.get("category_id"), entry.get("bbox"), entry.get("area")
    if type(category) is not int or category not in labels:
        raise LightspineError("object of an unknown category")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(side) for side in box)):
        raise LightspineError("box that is not four finite numbers")
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise LightspineError("box without area")
    if left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0:
        raise LightspineError("box outside the image")
    segmentation = entry.get("segmentation")
    if masks:
        check_segmentation(segmentation, image.height, image.width)
    if area is None or not _is_number(area) or area <= 0:
        issues.add("area missing, replaced by that of the box", where)
        area = width * height
    return _Object(
        box, labels[category], area, bool(entry.get("iscrowd")), json.dumps(segmentation) if masks else ""
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _pack_annotations(
    folder: Path,
    names: list[str],
    categories: list[int],
    images: dict[int, _Image],
    objects: dict[int, list[_Object]],
    masks: bool,
    issues: Issues,
) -> CocoAnnotations:
    flat = [found for number in images for found in objects[number]]
    return CocoAnnotations(
        folder=folder,
        class_names=names,
        category_ids=categories,
        files=PackedStrings.pack(image.name for image in images.values()),
        image_ids=np.array(list(images), dtype=np.int64),
        sizes=np.array([(image.height, image.width) for image in images.values()], dtype=np.int64),
        starts=np.cumsum([0, *(len(objects[number]) for number in images)], dtype=np.int64),
        boxes=np.array([found.box for found in flat], dtype=np.float64).reshape(-1, 4),
        labels=np.array([found.label for found in flat], dtype=np.int64),
        areas=np.array([found.area for found in flat], dtype=np.float64),
        crowd=np.array([found.crowd for found in flat], dtype=bool),
        segmentations=PackedStrings.pack(found.segmentation for found in flat) if masks else None,
        issues=issues,
    )
