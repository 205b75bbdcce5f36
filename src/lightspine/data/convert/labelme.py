"""Convert LabelMe annotations (one JSON file per image, polygons and rectangles) to COCO."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightspine.data.convert.output import (
    Conversion,
    ConvertedImage,
    ConvertedObject,
    check_folders,
    choose_classes,
    clip_box,
    write_coco_dataset,
)
from lightspine.data.convert.sources import SourceFiles, choose_split
from lightspine.data.detection.coco_values import to_float
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import is_text, parse_json, path_from_text
from lightspine.utils.image_files import read_image_size
from lightspine.utils.issues import Issues
from lightspine.utils.progress import progress_bar


def convert_labelme(
    source: str | Path,
    out: str | Path,
    *,
    class_names: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    link: bool = False,
) -> Conversion:
    """Convert LabelMe annotations to a COCO dataset with the splits `train`, `val` and `test`.

    Every JSON file below the folder that has `shapes` is read, with the image that its `imagePath` names, or
    that has its name. Polygons become objects with a mask, rectangles boxes without one; other shapes are
    left out. Splits are folders with the usual names; without them, a share of the images becomes the
    validation split. Everything left out or changed is counted in the result.

    Args:
        source: folder with the JSON files and images.
        out: folder to write; new or empty.
        class_names: file with one class name per line, in the order of the classes; labels in another case
            are taken for the same class, and objects of other classes are left out. Default: all labels.
        val_fraction: share of the images for validation if there are no splits.
        seed: seed of that split.
        link: make symbolic links to the images in place of copies.

    Raises:
        UsageError: a folder is missing or not empty, or there is no annotation or no usable object.
        LightspineError: a file cannot be written.
    """
    source, out = Path(source), Path(out)
    check_folders(source, out)
    issues = Issues()
    files = SourceFiles(source, {".json"}, issues)
    found: dict[Path, ConvertedImage] = {}
    used: set[Path] = set()
    for file in progress_bar(files.annotations, "reading the annotations"):
        try:
            image = _read_annotation(file, files, issues)
        except LightspineError as error:
            issues.add(str(error), str(file))
            continue
        if image.source in used:
            issues.add("second annotation file of an image", str(file))
            continue
        used.add(image.source)
        found[file] = image
    if not found:
        reason = f": {issues}" if issues else ""
        raise UsageError(f"expected LabelMe annotations (.json with shapes) in {source}, found none{reason}")
    for path in files.images:
        if path not in used:
            issues.add("image without a usable annotation file", str(path))
    names = choose_classes([*found.values()], class_names, issues)
    splits = choose_split(source, found, val_fraction, seed)
    return write_coco_dataset(out, splits, names, issues, link=link)


def _read_annotation(file: Path, files: SourceFiles, issues: Issues) -> ConvertedImage:
    """Read one JSON file.

    Raises:
        LightspineError: it is not a LabelMe annotation, or its image is missing or has another size.
    """
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise LightspineError("annotation file that is not JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise LightspineError("JSON file that is not a LabelMe annotation")
    written = str(content.get("imagePath") or "")
    if not is_text(written):
        raise LightspineError("annotation file whose image path is not valid Unicode")
    written = written.replace("\\", "/").rsplit("/", 1)[-1]
    path = files.find_image(file, path_from_text(written) if written else None)
    if path is None:
        raise LightspineError("annotation file without an image")
    try:
        size = read_image_size(path)
    except LightspineError as error:
        raise LightspineError("image that cannot be read") from error
    sides = [to_float(content.get(side)) for side in ("imageHeight", "imageWidth")]
    if all(sides) and tuple(sides) != size:
        raise LightspineError("image of another size than its annotation says")
    image = ConvertedImage(path, files.relative_name(path), size)
    for number, shape in enumerate(content["shapes"]):
        item = _read_shape(shape, size, f"{file}, shape {number + 1}", issues)
        if item is not None:
            image.objects.append(item)
    return image


def _read_shape(shape: Any, size: tuple[int, int], where: str, issues: Issues) -> ConvertedObject | None:
    if not isinstance(shape, Mapping):
        issues.add("shape that is not a JSON object", where)
        return None
    name = " ".join(str(shape.get("label") or "").split())
    if not name or not is_text(name):
        issues.add("shape without a label", where)
        return None
    kind = shape.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle"):
        issues.add(f"shape of the type {kind}", where)
        return None
    points = _read_points(shape.get("points"))
    if points is None or len(points) < (3 if kind == "polygon" else 2):
        issues.add(f"{kind} without enough points", where)
        return None
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    box = clip_box((left, top, right, bottom), size, where, issues)
    if box is None:
        return None
    height, width = size
    polygon = points.clip(0, [width, height]).ravel().tolist() if kind == "polygon" else []
    return ConvertedObject(name, box, tuple(polygon))


def _read_points(points: Any) -> np.ndarray | None:
    """Return the points of a shape, (points, 2), or `None` if they are no pairs of finite numbers."""
    if not isinstance(points, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in points):
        return None
    numbers = [to_float(value) for pair in points for value in pair]
    if None in numbers:
        return None
    return np.array(numbers, dtype=np.float64).reshape(-1, 2)
