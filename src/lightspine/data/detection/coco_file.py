"""Read and validate COCO annotation files."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from lightspine.data.class_names import find_class
from lightspine.data.detection.annotations import CocoAnnotations
from lightspine.data.detection.coco_values import to_box, to_flag, to_float, to_int
from lightspine.data.detection.masks import (
    NO_MASK,
    bounding_box,
    check_segmentation,
    normalize_segmentation,
)
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import parse_json, path_from_text
from lightspine.utils.image_files import read_image_size
from lightspine.utils.issues import Issues
from lightspine.utils.packed_strings import PackedStrings
from lightspine.utils.progress import progress_bar

# Folders of a path that may lie between the image folder and a file; more would take quadratic time.
_MOST_FOLDERS = 16


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

    Values whose meaning is clear are converted: numbers written as text, whole numbers written as floats,
    polygons without the outer list or made of points, backslashes and other folders in file names. A missing
    image size is read from the image file, a missing area is replaced by that of the box, and a missing box
    by that of the mask. Entries of one image file are joined.

    The following are skipped: images without an id or a file; objects of unknown images or categories;
    objects whose box is not four finite numbers, has no area, lies outside the image or inside its first
    pixel (as boxes in fractions of the image do); with `masks`, objects whose mask is missing, damaged, empty
    or of another size than the image. Everything skipped or replaced is counted in `issues`. Images without
    objects are kept.

    Args:
        file: the `.json` file.
        folder: folder of the image files.
        masks: read and check the masks.
        class_names: classes of a model, in the order of its labels, which categories are matched with by
            name; default: the categories of the file, in the order of their ids. Of several categories with
            one name, only one may have objects.

    Raises:
        UsageError: the file or folder does not exist; there is no image, no category or no usable object; a
            category with objects is not among `class_names`, or two of them have the same name.
        LightspineError: the file is not JSON or not a COCO file of objects.
    """
    file, folder = Path(file), Path(folder)
    content = _read_json(file)
    if not folder.is_dir():
        raise UsageError(f"expected a folder of images, but {folder} {_describe_path(folder)}")
    issues = Issues()
    annotations: list[Any] = content["annotations"]
    used = {to_int(entry.get("category_id")) for entry in annotations if isinstance(entry, dict)}
    names, labels = _read_categories(content["categories"], used, file, class_names, issues)
    images, aliases = _read_images(content["images"], file, folder, issues)
    objects: dict[int, list[_Object]] = {number: [] for number in images}
    known = {to_int(entry.get("id")) for entry in content["images"] if isinstance(entry, dict)} - {None}
    for order, entry in enumerate(progress_bar(annotations, f"reading {file.name}")):
        where = f"annotation {entry.get('id', order) if isinstance(entry, dict) else order}"
        try:
            image_id = _find_image_id(entry, known)
            image_id = aliases.get(image_id, image_id)
            # Objects of a missing image file are not reported one by one.
            if image_id in images:
                objects[image_id].append(_read_object(entry, images[image_id], labels, masks, where, issues))
        except LightspineError as error:
            issues.add(str(error), where)
    if annotations and not any(objects.values()):
        only_boxes = issues.counts[NO_MASK] == len(annotations)
        hint = "; train a detector of boxes, with head retinanet and data.masks=false" if only_boxes else ""
        raise UsageError(f"none of the {len(annotations)} objects of {file} can be used: {issues}{hint}")
    return _pack_annotations(
        folder, names, _number_classes(labels, len(names)), images, objects, masks, issues
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"expected a COCO file, but {file} {_describe_path(file)}")
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise LightspineError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise LightspineError(f"cannot read {file}: it is not JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise LightspineError(f"{file} is not a COCO file of objects: expected a list {key!r} in it")
    return content


def _describe_path(path: Path) -> str:
    return "is a folder" if path.is_dir() else "is a file" if path.exists() else "does not exist"


def _read_categories(
    entries: list[Any],
    used: set[int | None],
    file: Path,
    class_names: Sequence[str] | None,
    issues: Issues,
) -> tuple[list[str], dict[int, int]]:
    """Return the class names and category id -> label."""
    found: dict[int, str] = {}
    supercategories: dict[int, object] = {}
    for entry in entries:
        number, name = (
            (to_int(entry.get("id")), entry.get("name")) if isinstance(entry, dict) else (None, None)
        )
        if number is None or not isinstance(name, str):
            raise LightspineError(
                f"a category of {file} needs a whole number as id and a name, got {entry!r}"
            )
        if number in found:
            raise LightspineError(f"category id {number} appears twice in {file}")
        found[number] = name
        supercategories[number] = entry.get("supercategory")
    if not found:
        raise UsageError(f"expected at least one category in {file}")
    groups: dict[str, list[int]] = {}
    for number in sorted(found):
        groups.setdefault(found[number], []).append(number)
    parents = Counter(value for value in supercategories.values() if isinstance(value, str))
    for name, ids in list(groups.items()):
        others = len(found) - len(ids)
        below = parents[name] - sum(supercategories[number] == name for number in ids)
        known = class_names is not None and bool(find_class(name, class_names))
        if others == below > 0 and not known and not used.intersection(ids):
            # Roboflow writes one, which is no class.
            issues.add("category without objects that is the supercategory of all others", repr(name))
            del groups[name]
    if class_names is not None:
        return list(class_names), _match_categories(groups, used, file, class_names, issues)
    chosen = sorted(_choose_category(name, ids, used, file, issues) for name, ids in groups.items())
    return [found[number] for number in chosen], {number: label for label, number in enumerate(chosen)}


def _choose_category(name: str, ids: list[int], used: set[int | None], file: Path, issues: Issues) -> int:
    """Return the category with objects among those of one name; Roboflow also writes one without objects.

    Raises:
        UsageError: several have objects.
    """
    with_objects = [number for number in ids if number in used]
    if len(with_objects) > 1:
        raise UsageError(
            f"the categories {' and '.join(map(str, with_objects))} of {file} have the same name {name!r}, "
            "and each has objects: rename them, or give their objects one category"
        )
    chosen = (with_objects or ids)[0]
    for number in ids:
        if number != chosen:
            issues.add("category without objects that has the name of another one", f"id {number}, {name!r}")
    return chosen


def _match_categories(
    groups: dict[str, list[int]],
    used: set[int | None],
    file: Path,
    class_names: Sequence[str],
    issues: Issues,
) -> dict[int, int]:
    """Return category id -> label of the model's class of the same name."""
    labels: dict[int, int] = {}
    for name, ids in groups.items():
        matches = find_class(name, class_names)
        if not matches:
            if used.intersection(ids):
                raise UsageError(
                    f"category {name!r} of {file} is not among the model's {len(class_names)} classes"
                )
            issues.add("category without objects that is not among the model's classes", repr(name))
        elif len(matches) == 1:
            labels[_choose_category(name, ids, used, file, issues)] = matches[0]
        elif len(matches) == len(ids):
            # Older checkpoints may have several classes of one name, in the order of the category ids.
            labels |= dict(zip(ids, matches, strict=True))
        else:
            raise UsageError(
                f"the model has {len(matches)} classes {name!r}, and {file} has {len(ids)} categories of "
                "this name, so they cannot be matched"
            )
    if not labels:
        raise UsageError(f"none of the categories of {file} is among the model's {len(class_names)} classes")
    return labels


def _number_classes(labels: dict[int, int], count: int) -> list[int]:
    """Return the category id of every class; a class that the file lacks gets a new id."""
    of_label = {label: number for number, label in labels.items()}
    new = itertools.count(max(labels) + 1)
    return [of_label[label] if label in of_label else next(new) for label in range(count)]


def _read_images(
    entries: list[Any], file: Path, folder: Path, issues: Issues
) -> tuple[dict[int, _Image], dict[int, int]]:
    """Return the images by id, and id -> id of the first entry with the same image file."""
    listed: dict[int, dict[str, Any]] = {}
    for order, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {}
        number = to_int(fields.get("id"))
        if number is None:
            issues.add("image without a whole number as id", f"image {order}")
        elif not isinstance(fields.get("file_name"), str):
            issues.add("image without a file_name", f"image {number}")
        elif number in listed and listed[number]["file_name"] != fields["file_name"]:
            raise LightspineError(
                f"image id {number} of {file} belongs to {listed[number]['file_name']} and "
                f"{fields['file_name']}"
            )
        elif number in listed:
            issues.add("image listed twice", fields["file_name"])
        else:
            listed[number] = fields
    names = find_image_names([fields["file_name"] for fields in listed.values()], folder, issues)
    images: dict[int, _Image] = {}
    aliases: dict[int, int] = {}
    first: dict[str, int] = {}
    for (number, fields), name in zip(listed.items(), names, strict=True):
        if name is None:
            issues.add("image file missing", fields["file_name"])
        elif name in first:
            issues.add("image file with several ids, whose objects are joined", name)
            aliases[number] = first[name]
        elif (size := _read_size(fields, folder / name, issues)) is not None:
            first[name] = number
            images[number] = _Image(name, *size)
    if not images:
        missing = issues.examples.get("image file missing")
        reason = f", such as {missing}" if missing else f": {issues}" if issues else ""
        raise UsageError(f"found none of the {len(entries)} images of {file} in {folder}{reason}")
    return images, aliases


def find_image_names(written: Sequence[str], folder: Path, issues: Issues) -> list[str | None]:
    """Return the paths of image files below a folder, relative to it; `None` for a missing file.

    Backslashes are read as slashes. A file that is not found, or is outside the folder, is searched by the
    last parts of its path, as long as no other name leads to the same file.

    Args:
        written: file names as written in the annotations.
        folder: folder of the image files.
        issues: receives the number of names that were changed.
    """
    found = [_existing(name, folder) or _existing(name.replace("\\", "/"), folder) for name in written]
    others: dict[str, list[int]] = {}
    for position, name in enumerate(written):
        parts = PurePosixPath(name.replace("\\", "/")).parts
        first = max(1, len(parts) - _MOST_FOLDERS)
        ends = ("/".join(parts[start:]) for start in range(first, len(parts)))
        if found[position] is None and (
            end := next(filter(None, (_existing(e, folder) for e in ends)), None)
        ):
            others.setdefault(end, []).append(position)
    taken = set(found)
    for end, positions in others.items():
        if end not in taken and len({written[position] for position in positions}) == 1:
            for position in positions:
                found[position] = end
    for name, path in zip(written, found, strict=True):
        if path is not None and path != path_from_text(name):
            issues.add("file name with other folders or backslashes, found in the image folder", name)
    return found


def _existing(name: str, folder: Path) -> str | None:
    """Return the path of a file below the folder, or `None`; names must not lead out of the folder."""
    parts = PurePosixPath(name).parts
    try:
        path = path_from_text(name)
    except UnicodeEncodeError:
        return None
    inside = parts and not os.path.isabs(name) and ".." not in parts
    return path if inside and os.path.isfile(os.path.join(folder, path)) else None


def _read_size(fields: dict[str, Any], path: Path, issues: Issues) -> tuple[int, int] | None:
    height, width = to_int(fields.get("height")), to_int(fields.get("width"))
    if height is not None and width is not None and min(height, width) >= 1:
        return height, width
    try:
        size = read_image_size(path)
    except LightspineError:
        issues.add("image without a size that cannot be read", fields["file_name"])
        return None
    issues.add("image without a height and a width in pixels, read from the file", fields["file_name"])
    return size


def _find_image_id(entry: Any, known: set[int | None]) -> int:
    if not isinstance(entry, dict):
        raise LightspineError("annotation that is not a JSON object")
    image_id = to_int(entry.get("image_id"))
    if image_id is None or image_id not in known:
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
    category, area = to_int(entry.get("category_id")), to_float(entry.get("area"))
    if category is None or category not in labels:
        raise LightspineError("object of an unknown category")
    crowd = to_flag(entry.get("iscrowd"))
    segmentation: Any = entry.get("segmentation")
    no_box = entry.get("bbox") is None
    if masks or no_box:
        if not segmentation and no_box:
            raise LightspineError("object without a box and a mask")
        segmentation = normalize_segmentation(segmentation)
        check_segmentation(segmentation, image.height, image.width)
    if no_box:
        box = bounding_box(segmentation, image.height, image.width)
        issues.add("box missing, replaced by that of the mask", where)
    else:
        box = to_box(entry["bbox"])
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise LightspineError("box without area")
    if left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0:
        raise LightspineError("box outside the image")
    if min(left, top) >= 0 and max(left + width, top + height) <= 1 < max(image.width, image.height):
        raise LightspineError("box inside the first pixel, as if in fractions of the image")
    if left < -1 or top < -1 or left + width > image.width + 1 or top + height > image.height + 1:
        issues.add("box that reaches beyond the image, clipped", where)
    if area is None or area <= 0:
        issues.add("area missing, replaced by that of the box", where)
        area = width * height
    return _Object(box, labels[category], area, crowd, json.dumps(segmentation) if masks else "")


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
