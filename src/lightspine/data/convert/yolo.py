"""Convert YOLO annotations (one text file per image, boxes or polygons) to COCO."""

from pathlib import Path
from typing import Any

import yaml

from lightspine.data.class_names import read_class_names
from lightspine.data.convert.output import (
    TEST,
    TRAIN,
    VAL,
    Conversion,
    ConvertedImage,
    ConvertedObject,
    check_folders,
    clip_box,
    split_items,
    write_coco_dataset,
)
from lightspine.data.convert.sources import SourceFiles, choose_split
from lightspine.data.detection.coco_values import to_float, to_int
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import path_from_text
from lightspine.utils.image_files import read_image_size
from lightspine.utils.issues import Issues
from lightspine.utils.progress import progress_bar
from lightspine.utils.yaml_text import check_yaml_text

_CLASS_FILES = ("classes.txt", "obj.names", "classes.names", "_darknet.labels")
_NOT_LABELS = frozenset({*_CLASS_FILES, "requirements.txt", "labels.txt"})
# Fractions may leave the image by a rounding error.
_TOLERANCE = 1e-3


def convert_yolo(
    source: str | Path,
    out: str | Path,
    *,
    class_names: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    link: bool = False,
) -> Conversion:
    """Convert YOLO annotations to a COCO dataset with the splits `train`, `val` and `test`.

    The labels of an image are in the file of its name with the suffix `.txt`, beside the image or in a folder
    `labels` in place of `images`. A line is a box by its center, `CLASS X Y WIDTH HEIGHT`, or a polygon of at
    least three corners, `CLASS X1 Y1 X2 Y2 ...`, in fractions of the image. Images without a label file, or
    with an empty one, have no objects. Splits are the entries `train`, `val` and `test` of the dataset's YAML
    file, or folders with the usual names of splits; without either, a share of the images becomes the
    validation split. Everything left out or changed is counted in the result.

    Args:
        source: folder with the images, label files and class names.
        out: folder to write; new or empty.
        class_names: file with one class name per line; default: `names` of `data.yaml` or of the only YAML
            file, or `classes.txt`.
        val_fraction: share of the images for validation if there are no splits.
        seed: seed of that split.
        link: make symbolic links to the images in place of copies.

    Raises:
        UsageError: a folder is missing or not empty, there are no class names, no image or no object.
        LightspineError: a file cannot be read or written.
    """
    source, out = Path(source), Path(out)
    check_folders(source, out)
    issues = Issues()
    config = _read_config(source)
    names = _find_class_names(source, config, class_names)
    files = SourceFiles(source, {".txt"}, issues)
    if not files.images:
        raise UsageError(f"expected images in {source}, found none")
    labels = {file for file in files.annotations if not _is_note(file)}
    found: dict[Path, ConvertedImage] = {}
    used: set[Path] = set()
    for path in progress_bar(files.images, "reading the labels"):
        file = next((place for place in _label_places(path, source) if place in labels), None)
        if file is None:
            issues.add("image without a label file, taken as one without objects", str(path))
        try:
            image = ConvertedImage(path, files.relative_name(path), read_image_size(path))
        except LightspineError:
            issues.add("image that cannot be read", str(path))
            continue
        if file is not None:
            used.add(file)
            image.objects.extend(_read_labels(file, image.size, names, issues))
        found[path] = image
    splits = _split_by_config(source, config, found, issues)
    for file in sorted(labels - used - _listed_files(source, config)):
        issues.add("label file without an image", str(file))
    if splits is None:
        splits = choose_split(source, found, val_fraction, seed)
    elif not splits.get(VAL) and not splits.get(TEST):
        splits = dict(split_items(splits[TRAIN], val_fraction, seed, source))
    return write_coco_dataset(out, splits, names, issues, link=link)


def _is_note(file: Path) -> bool:
    """Return whether a text file is not meant as labels, such as Roboflow's `README.dataset.txt`."""
    name = file.name.lower()
    return name in _NOT_LABELS or name.startswith("readme.")


def _read_config(source: Path) -> dict[str, Any]:
    """Return the content of the dataset's YAML file, {} without one.

    Raises:
        LightspineError: it cannot be read.
    """
    candidates = [source / name for name in ("data.yaml", "data.yml", "dataset.yaml")]
    # Reading a named pipe or a device would never end.
    others = sorted(path for path in [*source.glob("*.yaml"), *source.glob("*.yml")] if path.is_file())
    file = next((path for path in candidates if path.is_file()), others[0] if len(others) == 1 else None)
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8-sig")
        check_yaml_text(text, "YAML file")
        content = yaml.safe_load(text)
    except UsageError as error:
        raise LightspineError(f"cannot read {file}: {error}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise LightspineError(f"cannot read {file}: it is not YAML") from error
    return content if isinstance(content, dict) else {}


def _find_class_names(source: Path, config: dict[str, Any], file: str | Path | None) -> list[str]:
    if file is not None:
        return read_class_names(file)
    names = config.get("names")
    if isinstance(names, dict) and names:
        numbers = {to_int(key): value for key, value in names.items()}
        if set(numbers) != set(range(len(names))):
            raise UsageError(
                f"expected class names numbered from 0 to {len(names) - 1} in the YAML file of {source}"
            )
        names = [numbers[number] for number in range(len(names))]
    if isinstance(names, list) and names:
        if not all(isinstance(name, str | int) for name in names) or len(set(map(str, names))) < len(names):
            raise UsageError(f"expected different class names in the YAML file of {source}")
        return [str(name) for name in names]
    found = next((source / name for name in _CLASS_FILES if (source / name).is_file()), None)
    if found is None:
        raise UsageError(f"expected class names: `names` in data.yaml or a file classes.txt in {source}")
    return read_class_names(found)


def _label_places(image: Path, root: Path) -> list[Path]:
    """Return the paths where the label file of an image may be, in order of preference."""
    file = image.with_suffix(".txt")
    parts = list(file.relative_to(root).parts)
    images = [position for position, part in enumerate(parts[:-1]) if part.lower() in ("images", "image")]
    if images:
        parts[images[-1]] = "labels"
    return [root.joinpath(*parts), file]


def _read_labels(
    file: Path, size: tuple[int, int], names: list[str], issues: Issues
) -> list[ConvertedObject]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        issues.add("label file that cannot be read", str(file))
        return []
    objects: dict[tuple[str, ...], ConvertedObject] = {}
    for number, line in enumerate(lines, 1):
        values, where = tuple(line.split()), f"{file}, line {number}"
        if not values:
            continue
        if values in objects:
            issues.add("line that is repeated", where)
        elif (item := _read_line(values, size, names, where, issues)) is not None:
            objects[values] = item
    return list(objects.values())


def _read_line(
    values: tuple[str, ...], size: tuple[int, int], names: list[str], where: str, issues: Issues
) -> ConvertedObject | None:
    label, numbers = to_int(values[0]), [to_float(value) for value in values[1:]]
    if label is None or any(number is None for number in numbers):
        issues.add("line that is not a class index and numbers", where)
        return None
    if not 0 <= label < len(names):
        issues.add(f"class index that is not among the {len(names)} classes", where)
        return None
    sides = [number for number in numbers if number is not None]
    is_box = len(sides) == 4
    if not is_box and (len(sides) < 6 or len(sides) % 2):
        issues.add("line that is neither a box of 4 numbers nor a polygon of 6 or more", where)
        return None
    if min(sides) < -_TOLERANCE or max(sides) > 1 + _TOLERANCE:
        issues.add("coordinates that are not fractions of the image, from 0 to 1", where)
        return None
    height, width = size
    polygon: tuple[float, ...] = ()
    if is_box:
        x, y, w, h = sides
        corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    else:
        fractions = [min(max(side, 0.0), 1.0) for side in sides]
        polygon = tuple(side * (height if odd % 2 else width) for odd, side in enumerate(fractions))
        corners = [min(polygon[0::2]), min(polygon[1::2]), max(polygon[0::2]), max(polygon[1::2])]
    box = clip_box(corners, size, where, issues)
    return None if box is None else ConvertedObject(names[label], box, polygon)


def _split_by_config(
    source: Path, config: dict[str, Any], found: dict[Path, ConvertedImage], issues: Issues
) -> dict[str, list[ConvertedImage]] | None:
    """Return the images of each split of the YAML file; `None` if it names none.

    Raises:
        UsageError: a split is not in the folder.
    """
    splits: dict[str, list[ConvertedImage]] = {}
    left = dict(found)
    for split in (TRAIN, VAL, TEST):
        entries = config.get(split)
        for entry in entries if isinstance(entries, list) else [entries] if entries else []:
            place = _find_entry(source, config, str(entry))
            if place is None:
                # Published YAML files often name a test split that is not in the archive.
                if split == TRAIN:
                    raise UsageError(f"expected the {split} split {entry} of the YAML file in {source}")
                issues.add("split of the YAML file that is missing", str(entry))
                continue
            listed = _read_image_list(place, source) if place.is_file() else None
            for path in list(left):
                inside = place in path.parents if listed is None else path in listed
                if inside:
                    splits.setdefault(split, []).append(left.pop(path))
    if not splits:
        return None
    for path in left:
        issues.add("image in no split of the YAML file", str(path))
    return splits


def _find_entry(source: Path, config: dict[str, Any], entry: str) -> Path | None:
    """Return the folder or list of a split inside the dataset."""
    parts = [part for part in Path(entry.replace("\\", "/")).parts if part not in ("..", ".")]
    base = str(config.get("path") or "")
    candidates = [source / base / entry, source / entry]
    # The path may be that of another machine: search its last parts.
    candidates += [source.joinpath(*parts[start:]) for start in range(len(parts))]
    root = source.resolve()
    for candidate in candidates:
        try:
            resolved = candidate.resolve(strict=True)
        # ValueError: a null character.
        except (OSError, ValueError, RuntimeError):
            continue
        if root in resolved.parents:
            return source / resolved.relative_to(root)
    return None


def _listed_files(source: Path, config: dict[str, Any]) -> set[Path]:
    """Return the text files that list the images of a split, which are no label files."""
    entries = [config.get(split) for split in (TRAIN, VAL, TEST)]
    flat = [entry for group in entries for entry in (group if isinstance(group, list) else [group]) if entry]
    found = {
        place for entry in flat if (place := _find_entry(source, config, str(entry))) and place.is_file()
    }
    return found | {source / f"{split}.txt" for split in (TRAIN, VAL, TEST)}


def _read_image_list(file: Path, source: Path) -> set[Path]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LightspineError(f"cannot read the list {file}: {error}") from error
    found = set()
    for line in filter(None, map(str.strip, lines)):
        place = _find_entry(source, {}, path_from_text(line))
        if place is not None:
            found.add(place)
    return found
