"""Small synthetic COCO files, and archives of real ones."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lightspine.data.detection import CocoAnnotations, read_coco
from support.images import shared_archive, write_image

SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]

# archive -> (split, file, folder of images)
_FILES = {
    "coco_free": {
        "train": ("annotations/instances_train2017.json", "train2017"),
        "val": ("annotations/instances_val2017.json", "val2017"),
    },
    "nuclei_dsb2018": {
        "train": ("annotations/instances_train.json", "train"),
        "val": ("annotations/instances_val.json", "val"),
    },
    "fixtures_tiny": {
        "coco": ("coco/instances.json", "coco/images"),
        "nuclei": ("nuclei/instances.json", "nuclei/images"),
    },
}


def unpack(name: str, factory: pytest.TempPathFactory) -> Path:
    """Unpack an archive of real images once per test session; skip the test if it is missing."""
    archive = shared_archive(f"{name}.tar.gz")
    root = factory.getbasetemp() / "real"
    if not (root / name).is_dir():
        with tarfile.open(archive) as file:
            file.extractall(root, filter="data")
    return root / name


def real_files(name: str, split: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the COCO file of real images and their folder."""
    root = unpack(name, factory)
    file, folder = _FILES[name][split]
    return root / file, root / folder


def real_annotations(
    name: str, split: str, factory: pytest.TempPathFactory, **options: Any
) -> CocoAnnotations:
    """Read a COCO file of real images."""
    return read_coco(*real_files(name, split, factory), **options)


def square(**changes: Any) -> dict[str, Any]:
    """Return an annotation of image 1: a square of 20 px at (10, 10), of category 7."""
    return {
        "id": 1,
        "image_id": 1,
        "category_id": 7,
        "bbox": [10.0, 10.0, 20.0, 20.0],
        "area": 400.0,
        "iscrowd": 0,
        "segmentation": SQUARE,
    } | changes


def content(*annotations: Any, images: int = 1) -> dict[str, Any]:
    """Return a COCO file's content with images of 64 x 48 px and the categories 3 (cat) and 7 (dog)."""
    return {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": 48, "width": 64}
            for number in range(1, images + 1)
        ],
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write_coco(folder: Path, described: dict[str, Any] | None = None) -> Path:
    """Write `folder/objects.json` and its images; returns the file."""
    described = content(square()) if described is None else described
    for image in described["images"]:
        write_image(folder / image["file_name"], (90, 60, 200), size=(64, 48), seed=image["id"])
    file = folder / "objects.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(described))
    return file


def read_small(folder: Path, *annotations: Any, images: int = 1, **options: Any) -> CocoAnnotations:
    """Write a small COCO file and read it."""
    return read_coco(write_coco(folder, content(*annotations, images=images)), folder, **options)
