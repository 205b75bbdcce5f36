"""Convert images with segmentation masks (any values or colors) to images with label maps."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from lightspine.data.class_names import read_class_names
from lightspine.data.convert.output import Conversion, check_folders, place_file
from lightspine.data.convert.sources import choose_split, split_of_name
from lightspine.data.segmentation.label_maps import IGNORED, MAX_CLASSES, LabelReader
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.files import atomic_folder, atomic_write_text
from lightspine.utils.image_files import ImageListing, open_upright, read_image_size
from lightspine.utils.issues import Issues
from lightspine.utils.progress import progress_bar

_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "leftimg8bit"})
_MASK_FOLDERS = frozenset(
    {"annotations", "annotation", "gt", "gtfine", "label", "labels", "mask", "masks", "segmentationclass"}
)
_MASK_AFFIXES = re.compile(
    r"(?i)^(mask|label|gt)[_-]|[_-](masks?|labels?|gt|seg|segmentation|l|matte|gtfine_label(train)?ids)$"
)
_IMAGE_AFFIXES = re.compile(r"(?i)[_-](image|img|leftimg8bit|sat|rgb)$")
_GRAY_MODES = frozenset({"1", "L", "P", "I;16", "I;16B", "I;16L", "I"})
_COLOR_MODES = frozenset({"RGB", "RGBA"})


def convert_masks(
    source: str | Path,
    out: str | Path,
    *,
    class_names: str | Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    link: bool = False,
) -> Conversion:
    """Convert images with masks to `images/SPLIT`, `annotations/SPLIT` and `classes.txt`.

    A mask is an image in a folder such as `masks`, `labels` or `SegmentationClass`, or one whose name ends in
    `_mask`, `_label`, ...; it belongs to the image of the same name. The values or RGB colors of all masks,
    in ascending order, become the classes 0, 1, 2, ... If they are 0, 1, 2, ... already, and 255, then 255
    stays the value of ignored pixels; masks of 0 and 255 get two classes. Every written label map is read
    back and compared. Images without a mask, masks without an image and pairs of different sizes are left
    out and counted.

    Args:
        source: folder with the images and masks, with or without folders of splits.
        out: folder to write; new or empty.
        class_names: file with the name of every value in ascending order, one per line, or lines
            `NAME VALUE` or `NAME R G B`, whose order is that of the classes; pixels of other values are then
            ignored. Default: background and foreground for two values, otherwise the values.
        val_fraction: share of the images for validation if there are no splits.
        seed: seed of that split.
        link: make symbolic links to the images in place of copies.

    Raises:
        UsageError: a folder is missing or not empty, no mask belongs to an image, or the masks have fewer
            than two values or more than 255.
        LightspineError: a file cannot be read or written.
    """
    source, out = Path(source), Path(out)
    check_folders(source, out)
    issues = Issues()
    pairs = _find_pairs(source, issues)
    lines = None if class_names is None else read_class_names(class_names)
    given = None if lines is None else _parse_lines(lines)
    values: set[int] = set()
    usable: dict[Path, Path] = {}
    for image, mask in progress_bar(pairs.items(), "reading the masks"):
        try:
            found = _read_values(mask)
            size = read_image_size(image)
        except LightspineError as error:
            issues.add("pair that cannot be read", f"{mask} ({error})")
            continue
        if found.shape != size:
            issues.add("mask of another size than its image", str(mask))
            continue
        usable[image] = mask
        values.update(np.unique(found).tolist())
        if given is None:
            _check_count(values - {IGNORED}, mask, least=0)
    if not usable:
        raise UsageError(f"none of the {len(pairs)} masks of {source} can be used: {issues}")
    if given is not None:
        classes, names = (
            {value: number for number, (_, value) in enumerate(given)},
            [name for name, _ in given],
        )
    else:
        classes, names = _choose_classes(values, lines, mask)
    splits = choose_split(
        source, {image: (image, mask) for image, mask in usable.items()}, val_fraction, seed
    )
    counts = np.zeros(IGNORED + 1, dtype=np.int64)
    with atomic_folder(out) as folder:
        reader = LabelReader(len(names))
        for split, members in splits.items():
            for image, mask in progress_bar(members, f"writing {split}"):
                labels = _map_values(_read_values(mask), classes, mask, issues)
                name = _common_name(image, source)
                place_file(image, folder / "images" / split / f"{name}{image.suffix}", link=link)
                path = folder / "annotations" / split / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(labels).save(path)
                if not np.array_equal(reader.read(path), labels):
                    raise LightspineError(f"the label map written for {mask} does not read back equal")
                counts += np.bincount(labels.ravel(), minlength=IGNORED + 1)
        atomic_write_text(folder / "classes.txt", "".join(f"{name}\n" for name in names))
    pixels = {name: int(count) for name, count in zip([*names], counts, strict=False)}
    return Conversion(
        out,
        names,
        {split: len(members) for split, members in splits.items()},
        pixels | {"ignored": int(counts[IGNORED])},
        issues,
    )


def _find_pairs(source: Path, issues: Issues) -> dict[Path, Path]:
    """Return image -> mask.

    Raises:
        UsageError: there is no pair, or an image has two masks.
    """
    listing = ImageListing(source, repeat_links=True)
    images: dict[tuple[str | None, str], Path] = {}
    masks: dict[tuple[str | None, str], Path] = {}
    for path in listing.list(source):
        is_mask = _is_mask(path, source)
        known = masks if is_mask else images
        key = _key(path, source)
        if key in known:
            kind = "mask" if is_mask else "image"
            raise UsageError(f"expected one {kind} of the name {key[1]}, found {known[key]} and {path}")
        known[key] = path
    for kind, count in listing.left_out.counts.items():
        issues.add(kind, listing.left_out.examples[kind], count)
    pairs = {path: masks[key] for key, path in images.items() if key in masks}
    if not pairs:
        raise UsageError(
            f"found no image with a mask among {len(images)} images and {len(masks)} masks of {source}: "
            "expected masks with the names of their images in a folder such as masks, or NAME_mask.png"
        )
    for key, path in images.items():
        if key not in masks:
            issues.add("image without a mask", str(path))
    for key, path in masks.items():
        if key not in images:
            issues.add("mask without an image", str(path))
    return pairs


def _is_mask(path: Path, root: Path) -> bool:
    folders = [folder.lower() for folder in path.relative_to(root).parts[:-1]]
    roles = [folder in _MASK_FOLDERS for folder in folders if folder in _MASK_FOLDERS | _IMAGE_FOLDERS]
    return roles[-1] if roles else bool(_MASK_AFFIXES.search(path.stem))


def _key(path: Path, root: Path) -> tuple[str | None, str]:
    """Return the split of an image or mask file, and the base name by which the two are paired."""
    folders = path.relative_to(root).parts[:-1]
    split = next(filter(None, map(split_of_name, folders)), None)
    return split, _common_name(path, root)


def _common_name(path: Path, root: Path) -> str:
    *folders, _ = path.relative_to(root).parts
    kept = [
        folder
        for folder in folders
        if folder.lower() not in _MASK_FOLDERS | _IMAGE_FOLDERS and split_of_name(folder) is None
    ]
    affixes = _MASK_AFFIXES if _is_mask(path, root) else _IMAGE_AFFIXES
    return "/".join([*kept, affixes.sub("", path.stem) or path.stem])


def _read_values(path: Path) -> np.ndarray:
    """Return the value of every pixel of a mask, (height, width), int64; colors as 2^24 + RGB.

    Raises:
        LightspineError: it cannot be read, or has pixels of another type.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LightspineError(f"cannot read mask {path}: {error.strerror or error}") from error
    with open_upright(data, f"mask {path}") as image:
        mode, pixels = image.mode, np.asarray(image)
    if mode in _GRAY_MODES:
        if not 0 <= int(pixels.min()) <= int(pixels.max()) < 1 << 24:
            raise LightspineError(f"expected values from 0 to 16777215 in mask {path}")
        return pixels.astype(np.int64)
    if mode == "LA":
        return pixels[..., 0].astype(np.int64)
    if mode not in _COLOR_MODES:
        raise LightspineError(f"expected gray or RGB pixels in mask {path}, got an image of mode {mode}")
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return red
    return _color(red, green, blue)


def _color(red: np.ndarray | int, green: np.ndarray | int, blue: np.ndarray | int) -> np.ndarray:
    # Gray is a value of its own, so that black is 0 in gray and colored masks alike.
    value = np.asarray((1 << 24) + (red << 16) + (green << 8) + blue)
    gray = (np.asarray(red) == green) & (np.asarray(red) == blue)
    return np.where(gray, red, value)


def _choose_classes(
    values: set[int], names: list[str] | None, example: Path
) -> tuple[dict[int, int], list[str]]:
    """Return value -> class index or 255, and the class names.

    Raises:
        UsageError: too few or too many values, or another number of names.
    """
    found = sorted(values)
    kept = [value for value in found if value != IGNORED]
    has_ignored = IGNORED in values and len(kept) > 1 and kept == list(range(len(kept)))
    chosen = kept if has_ignored else found
    _check_count(chosen, example, least=2)
    names = _default_names(chosen) if names is None else names
    if len(names) != len(chosen):
        raise UsageError(
            f"expected {len(chosen)} class names, one per value of the masks "
            f"({', '.join(map(_describe, chosen[:20]))}), got {len(names)}"
        )
    classes = {value: number for number, value in enumerate(chosen)}
    return classes | ({IGNORED: IGNORED} if has_ignored else {}), names


def _check_count(values: Collection[int], example: Path, *, least: int) -> None:
    if not least <= len(values) <= MAX_CLASSES:
        hint = "; masks must be lossless, such as PNG, and not smoothed" if len(values) > MAX_CLASSES else ""
        raise UsageError(
            f"expected 2 to {MAX_CLASSES} values in the masks, such as {example}, got {len(values)}{hint}"
        )


def _parse_lines(lines: list[str]) -> list[tuple[str, int]] | None:
    """Return name and value of lines `NAME VALUE` or `NAME R G B`; `None` if the lines are names only."""
    for columns in (r"\s+(\d{1,3})" * 3, r"\s+(\d{1,5})"):
        matches = [re.match(rf"(.*?\S){columns}$", line) for line in lines]
        if all(matches):
            break
    else:
        return None
    named = []
    for match in filter(None, matches):
        numbers = [int(part) for part in match.groups()[1:]]
        named.append((match[1], int(_color(*numbers)) if len(numbers) == 3 else numbers[0]))
    if len({value for _, value in named}) < len(named):
        raise UsageError("expected different values for the classes in the file of class names")
    return named


def _default_names(values: list[int]) -> list[str]:
    if len(values) == 2:
        return ["background", "foreground"]
    colored = max(values) >= 1 << 24
    # Black, white and gray among colors are colors too.
    return [
        f"#{value:02x}{value:02x}{value:02x}" if colored and value < 256 else _describe(value)
        for value in values
    ]


def _describe(value: int) -> str:
    return str(value) if value < 1 << 24 else f"#{value - (1 << 24):06x}"


def _map_values(values: np.ndarray, classes: Mapping[int, int], mask: Path, issues: Issues) -> np.ndarray:
    known, positions = np.unique(values, return_inverse=True)
    mapped = np.array([classes.get(int(value), -1) for value in known])
    unknown = known[mapped < 0]
    for value in unknown.tolist():
        issues.add(f"mask with the value {_describe(value)}, which has no class and is ignored", str(mask))
    mapped[mapped < 0] = IGNORED
    return mapped.astype(np.uint8)[positions].reshape(values.shape)
