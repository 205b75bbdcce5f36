"""Files of a dataset to convert: annotation files, images, and their splits."""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from lightspine.data.convert.output import TEST, TRAIN, VAL, split_items
from lightspine.data.split_names import TRAIN_SPLITS, VAL_SPLITS, find_split
from lightspine.errors import UsageError
from lightspine.utils.image_files import ImageListing, is_visible_folder
from lightspine.utils.issues import Issues

Item = TypeVar("Item")

_SPLITS = {TRAIN: TRAIN_SPLITS, VAL: VAL_SPLITS[:3], TEST: VAL_SPLITS[3:]}
# Folders that separate images from annotations, which the written paths do not need.
_ROLE_FOLDERS = frozenset({"images", "image", "imgs", "jpegimages", "annotations", "labels", "xmls"})


class SourceFiles:
    """The annotation files and images below a folder.

    Args:
        root: the folder.
        suffixes: suffixes of the annotation files.
        issues: receives what was left out.

    Attributes:
        annotations: annotation files, sorted.
        images: image files, sorted; see `ImageListing`.
    """

    def __init__(self, root: Path, suffixes: Collection[str], issues: Issues) -> None:
        self.root = root
        listing = ImageListing(root)
        self.images = listing.list(root)
        self.annotations = []
        for path in sorted(_walk(root, suffixes)):
            # Reading a named pipe or a device would never end.
            if path.is_file():
                self.annotations.append(path)
            else:
                issues.add("annotation file that is no ordinary file", str(path))
        for kind, count in listing.left_out.counts.items():
            # Annotation files are files of another type only for the listing of images.
            if not any(kind.endswith(suffix) for suffix in {*suffixes, ".txt", ".yaml", ".xml", ".json"}):
                issues.add(kind, listing.left_out.examples[kind], count)
        self._by_name: dict[str, list[Path]] = {}
        for path in self.images:
            for key in {path.name, path.stem}:
                self._by_name.setdefault(key, []).append(path)

    def find_image(self, annotation: Path, written: str | None) -> Path | None:
        """Return the image of an annotation file: of the written name, else of the file's own name.

        Of several images of one name, the one in the same folder or split is chosen; `None` if there is none
        or it is not clear which one is meant.
        """
        for key in (written, annotation.stem):
            found = self._by_name.get(key, []) if key else []
            near = [path for path in found if path.parent == annotation.parent]
            same = [path for path in found if split_of(path, self.root) == split_of(annotation, self.root)]
            for candidates in (near, same, found):
                if len(candidates) == 1:
                    return candidates[0]
        return None

    def relative_name(self, path: Path) -> str:
        """Return the path below the root without the folders of splits and of images."""
        *folders, name = path.relative_to(self.root).parts
        kept = [
            folder
            for folder in folders
            if folder.lower() not in _ROLE_FOLDERS and split_of_name(folder) is None
        ]
        return "/".join([*kept, name])


def split_of_name(name: str) -> str | None:
    """Return the split, "train", "val" or "test", that a folder name stands for."""
    return next((split for split, names in _SPLITS.items() if find_split([name], names, name)), None)


def split_of(path: Path, root: Path) -> str | None:
    """Return the split of the first folder below the root that has the name of one."""
    return next(filter(None, map(split_of_name, path.relative_to(root).parts[:-1])), None)


def choose_split(
    root: Path, items: Mapping[Path, Item], val_fraction: float, seed: int
) -> dict[str, list[Item]]:
    """Split items by the folders of their files, or at random if no folder is a split.

    Args:
        root: root of the dataset.
        items: file -> item.
        val_fraction: share for validation.
        seed: seed of the random split.

    Raises:
        UsageError: some files are in split folders and others are not, or there are too few to split.
    """
    splits: dict[str | None, list[Item]] = {}
    for path, item in items.items():
        splits.setdefault(split_of(path, root), []).append(item)
    outside = splits.pop(None, [])
    named = {name: found for name, found in splits.items() if name is not None}
    if not named:
        return dict(split_items(outside, val_fraction, seed, root))
    if outside:
        raise UsageError(
            f"expected all or none of the images of {root} in folders of splits, but {len(outside)} are "
            f"outside {' and '.join(sorted(named))}"
        )
    if set(named) == {TRAIN}:
        return dict(split_items(named[TRAIN], val_fraction, seed, root))
    return named


def _walk(root: Path, suffixes: Collection[str]) -> Iterable[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if is_visible_folder(name)]
        for name in names:
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("."):
                yield Path(parent, name)
