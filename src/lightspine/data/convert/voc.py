"""Convert Pascal VOC annotations (one XML file per image) to COCO."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from lightspine.data.convert.output import (
    TEST,
    TRAIN,
    VAL,
    Conversion,
    ConvertedImage,
    ConvertedObject,
    check_folders,
    choose_classes,
    clip_box,
    split_items,
    write_coco_dataset,
)
from lightspine.data.convert.sources import SourceFiles, choose_split
from lightspine.data.detection.coco_values import to_float
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import path_from_text
from lightspine.utils.image_files import read_image_size
from lightspine.utils.issues import Issues
from lightspine.utils.progress import progress_bar

Difficult = Literal["crowd", "keep", "drop"]


class _Options(NamedTuple):
    first_pixel: int
    difficult: Difficult


def convert_voc(
    source: str | Path,
    out: str | Path,
    *,
    first_pixel: Literal[0, 1] = 1,
    difficult: Difficult = "crowd",
    class_names: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    link: bool = False,
) -> Conversion:
    """Convert Pascal VOC annotations to a COCO dataset with the splits `train`, `val` and `test`.

    Every XML file below the folder is read, with the image that its `filename` names, or that has its name.
    Splits are the lists `ImageSets/Main/{train,val,test,trainval}.txt`, or folders with the usual names of
    splits; without either, a share of the images becomes the validation split. An image whose size differs
    from that in its XML file is left out. Boxes beyond the image are clipped. Everything left out or changed
    is counted in the result.

    Args:
        source: folder with the XML files and images.
        out: folder to write; new or empty.
        first_pixel: 1 as in VOC, whose corners are pixels, counted from 1, that belong to the box; 0 for
            programs that write the coordinates of the corners, counted from 0.
        difficult: what objects marked as difficult become: "crowd" (ignored in training and scores, as in
            VOC's own), "keep" (ordinary objects) or "drop".
        class_names: file with one class name per line, in the order of the classes; names in another case
            are taken for the same class, and objects of other classes are left out. Default: all names.
        val_fraction: share of the images for validation if there are no splits.
        seed: seed of that split.
        link: make symbolic links to the images in place of copies.

    Raises:
        UsageError: a folder is missing or not empty, there is no XML file or no usable object, or a value is
            out of range.
        LightspineError: a file cannot be written.
    """
    source, out = Path(source), Path(out)
    check_folders(source, out)
    if first_pixel not in (0, 1) or difficult not in ("crowd", "keep", "drop"):
        raise UsageError(
            f"expected first_pixel 0 or 1 and difficult crowd, keep or drop, got {first_pixel} and "
            f"{difficult}"
        )
    issues = Issues()
    files = SourceFiles(source, {".xml"}, issues)
    if not files.annotations:
        raise UsageError(f"expected VOC annotations (.xml) in {source}, found none")
    options = _Options(first_pixel, difficult)
    found: dict[Path, ConvertedImage] = {}
    used: set[Path] = set()
    for file in progress_bar(files.annotations, "reading the annotations"):
        try:
            image = _read_annotation(file, files, options, issues)
        except LightspineError as error:
            issues.add(str(error), str(file))
            continue
        if image.source in used:
            issues.add("second annotation file of an image", str(file))
            continue
        used.add(image.source)
        found[file] = image
    for path in files.images:
        if path not in used:
            issues.add("image without a usable annotation file", str(path))
    names = choose_classes([*found.values()], class_names, issues)
    lists = _read_split_lists(source, {file.stem for file in files.annotations}, issues)
    splits = _split(source, found, lists, val_fraction, seed, issues)
    return write_coco_dataset(out, splits, names, issues, link=link)


def parse_xml(file: Path) -> ElementTree.Element:
    """Parse an XML file without a document type, whose entities could expand to gigabytes.

    Raises:
        LightspineError: the file cannot be read, is not XML or has a document type.
    """
    try:
        data = file.read_bytes()
        scan = expat.ParserCreate()
        scan.StartDoctypeDeclHandler = _reject_doctype
        scan.Parse(data, True)
        return ElementTree.fromstring(data)
    except OSError as error:
        raise LightspineError(f"annotation file that cannot be read ({error.strerror or error})") from error
    # ValueError and LookupError for unknown encodings.
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise LightspineError("annotation file that is not XML") from error


def _reject_doctype(*_: object) -> None:
    raise LightspineError("annotation file with a document type (DTD)")


def _read_annotation(file: Path, files: SourceFiles, options: _Options, issues: Issues) -> ConvertedImage:
    """Read one XML file.

    Raises:
        LightspineError: it is not a VOC annotation, or its image is missing or has another size.
    """
    root = parse_xml(file)
    if root.tag != "annotation":
        raise LightspineError("XML file that is not a VOC annotation")
    written = (root.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    path = files.find_image(file, path_from_text(written) if written else None)
    if path is None:
        raise LightspineError("annotation file without an image")
    try:
        size = read_image_size(path)
    except LightspineError as error:
        raise LightspineError("image that cannot be read") from error
    sides = [to_float(root.findtext(f"size/{side}", "").strip()) for side in ("height", "width")]
    if all(sides) and tuple(sides) != size:
        turned = tuple(reversed(sides)) == size
        raise LightspineError(
            "image annotated with height and width exchanged, as if before its EXIF orientation was applied"
            if turned
            else "image of another size than its annotation says"
        )
    image = ConvertedImage(path, files.relative_name(path), size)
    for number, entry in enumerate(root.findall("object")):
        item = _read_object(entry, size, f"{file}, object {number + 1}", options, issues)
        if item is not None:
            image.objects.append(item)
    return image


def _read_object(
    entry: ElementTree.Element, size: tuple[int, int], where: str, options: _Options, issues: Issues
) -> ConvertedObject | None:
    name = " ".join((entry.findtext("name") or "").split())
    if not name:
        issues.add("object without a class name", where)
        return None
    corners = [
        to_float(entry.findtext(f"bndbox/{side}", "").strip()) for side in ("xmin", "ymin", "xmax", "ymax")
    ]
    if any(side is None for side in corners):
        issues.add("object without four corners", where)
        return None
    left, top, right, bottom = (side for side in corners if side is not None)
    if options.first_pixel and min(left, top) < 1:
        issues.add("corner below 1, the first pixel; if corners count from 0, pass --first-pixel 0", where)
    box = clip_box(
        (left - options.first_pixel, top - options.first_pixel, right, bottom), size, where, issues
    )
    if box is None:
        return None
    difficult = (entry.findtext("difficult") or "0").strip().lower() in ("1", "true")
    if difficult and options.difficult == "drop":
        issues.add("difficult object", where)
        return None
    crowd = difficult and options.difficult == "crowd"
    if crowd:
        issues.add("difficult object, which training and scores ignore", where)
    return ConvertedObject(name, box, crowd=crowd)


def _read_split_lists(source: Path, stems: Collection[str], issues: Issues) -> dict[str, str]:
    """Return image stem -> split of the lists in `ImageSets/Main`, at any depth; {} without lists.

    A line is the name of an image, which may have blanks, with or without a flag -1, 0 or 1. Image names of
    the yearly editions of VOC differ, so that their lists can be joined.
    """
    splits: dict[str, str] = {}
    folders = sorted(source.glob("**/ImageSets/Main"))
    files = [(split, folder / f"{split}.txt") for folder in folders for split in (TRAIN, VAL, TEST)]
    for split, file in files:
        if not file.is_file():
            continue
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LightspineError(f"cannot read the list {file}: {error}") from error
        for line in filter(None, map(str.strip, lines)):
            stem = line if line in stems else re.sub(r"\s+-?[01]$", "", line)
            if splits.setdefault(stem, split) != split:
                issues.add("image in two split lists, kept in the first", f"{stem} of {file}")
    # A list trainval is split at random, as if there were no lists.
    return splits if set(splits.values()) - {TEST} else {}


def _split(
    source: Path,
    found: Mapping[Path, ConvertedImage],
    lists: Mapping[str, str],
    val_fraction: float,
    seed: int,
    issues: Issues,
) -> dict[str, list[ConvertedImage]]:
    if not lists:
        return choose_split(source, found, val_fraction, seed)
    splits: dict[str, list[ConvertedImage]] = {}
    for file, image in found.items():
        split = lists.get(file.stem)
        if split is None:
            issues.add("image in no split list", str(image.source))
        else:
            splits.setdefault(split, []).append(image)
    if VAL not in splits and TEST not in splits and TRAIN in splits:
        return split_items(splits[TRAIN], val_fraction, seed, source)
    return splits
