"""Draw images of a dataset with their ground truth, as the trainer sees them."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightspine.data import modules
from lightspine.data.dataset import ImageDataset
from lightspine.data.detection import DetectionDataset, find_coco, find_train_split, is_coco
from lightspine.data.modules import (
    CocoDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    SegmentationFolderDataModule,
)
from lightspine.data.segmentation.folders import IMAGE_FOLDERS, LABEL_FOLDERS
from lightspine.data.split_names import find_split_folder
from lightspine.data.transforms import Preprocessing
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.draw import draw_classes, draw_detections, draw_image_grid
from lightspine.recipes import find_recipe
from lightspine.training.class_paths import read_recipe
from lightspine.utils.files import parse_json
from lightspine.utils.progress import progress_bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawnSample:
    """A drawn image.

    Attributes:
        image: path of the image.
        content: what it shows: number of objects per class, share of each class, or the class.
        picture: the picture.
    """

    image: str
    content: str
    picture: Path


def draw_ground_truth(
    data: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    count: int = 16,
    augmented: bool = False,
    recipe: str | None = None,
    boxes_only: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> list[DrawnSample]:
    """Draw randomly chosen images of a dataset with their boxes and masks, label maps or classes.

    The images and their ground truth come from the data module that training uses: without the images and
    objects that it leaves out and, with `augmented`, after its augmentation.

    Args:
        data: COCO folder, folder of images and label maps, or folder of class folders.
        out: folder for the pictures.
        split: "train" or "val".
        count: number of images.
        augmented: draw the training images as the network gets them, in epoch 0.
        recipe: name or file of a training recipe, whose data module and settings are used; default: the data
            module for the layout of the folder, with its default settings.
        boxes_only: read the boxes but not the masks of a COCO folder, as for detectors without a mask head.
        seed: seed of the choice of images and of the augmentation.
        progress: show a progress bar on standard error.

    Returns:
        The drawn images.

    Raises:
        UsageError: an unknown layout or split, a count below 1, or `augmented` for the validation split.
        LightspineError: a file cannot be read or written, or none of the chosen images can be used.
    """
    if split not in ("train", "val") or count < 1:
        raise UsageError(
            f"expected the split train or val and a count of at least 1, got {split!r} and {count}"
        )
    if augmented and split == "val":
        raise UsageError("expected the split train with augmentation, because validation images have none")
    module = _create_module(Path(data), recipe, boxes_only, seed)
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    seeded = loader.dataset
    dataset: Any = seeded.dataset if split == "train" else seeded
    positions = sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset))))
    if isinstance(dataset, ImageDataset):
        return _draw_classified(dataset, seeded, positions, module, augmented, Path(out))
    drawn = []
    for number, position in enumerate(progress_bar(positions, "drawing", shown=progress)):
        name = dataset.image_name(position)
        picture = Path(out) / f"{number:03}_{Path(name).stem}.png"
        item = seeded[position] if augmented else _read_item(dataset, position)
        if item.bad:
            raise LightspineError(item.bad[0].reason)
        if isinstance(dataset, DetectionDataset):
            content = _draw_objects(item, module, picture)
        else:
            content = _draw_labels(item, module, picture, normalized=augmented)
        drawn.append(DrawnSample(name, content, picture))
    return drawn


def _create_module(data: Path, recipe: str | None, boxes_only: bool, seed: int) -> ImageDataModule:
    if not data.is_dir():
        raise UsageError(
            f"expected a folder, but {data} {'is a file' if data.exists() else 'does not exist'}"
        )
    if recipe is not None:
        return _module_of_recipe(data, recipe, boxes_only)
    # One process reads the few images that are drawn.
    options: dict[str, Any] = {"num_workers": 0, "seed": seed, "batch_size": 1}
    if is_coco(data):
        return CocoDataModule(data, masks=not boxes_only and _has_masks(data), **options)
    if find_split_folder(data, IMAGE_FOLDERS) and find_split_folder(data, LABEL_FOLDERS):
        return SegmentationFolderDataModule(data, **options)
    return ImageFolderDataModule(data, **options)


def _module_of_recipe(data: Path, recipe: str, boxes_only: bool) -> ImageDataModule:
    """Create the data module of a recipe with another folder.

    Raises:
        UsageError: the recipe has no data module of lightspine that reads a folder.
    """
    content = read_recipe(find_recipe(recipe))
    entry = content.get("data") if isinstance(content, dict) else None
    path, arguments = (
        (entry.get("class_path"), entry.get("init_args")) if isinstance(entry, dict) else (None, None)
    )
    package, _, name = str(path).rpartition(".")
    if package != modules.__name__ or name not in modules.__all__ or not isinstance(arguments, dict):
        raise UsageError(f"expected a data module of {modules.__name__} in the recipe {recipe}, got {path}")
    if "root" not in arguments:
        raise UsageError(f"expected a recipe that reads a folder, but {name} of {recipe} has no root")
    changed = {"root": data, "num_workers": 0} | ({"masks": False} if boxes_only else {})
    return cast(ImageDataModule, getattr(modules, name)(**(arguments | changed)))


def _has_masks(data: Path) -> bool:
    """Return whether every object of the training split has a mask, so that reading masks drops none."""
    file, _ = find_coco(data, split=find_train_split(data))
    try:
        annotations = parse_json(file.read_bytes()).get("annotations")
        with_mask = sum(bool(entry.get("segmentation")) for entry in annotations)
    # A file of another form is reported when it is read.
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    if 0 < with_mask < len(annotations):
        _log.warning(
            "%d of %d objects of %s have a mask: only boxes are drawn, and a detector with masks would train "
            "on these objects alone",
            with_mask,
            len(annotations),
            file,
        )
    return 0 < with_mask == len(annotations)


def _read_item(dataset: Any, position: int) -> Any:
    """Return an item without augmentation and normalization."""
    transform = dataset.transform
    dataset.transform = None if isinstance(dataset, DetectionDataset) else _keep
    try:
        # A new item: an image that cannot be read is an error here, and is not replaced by another one.
        return dataset.make_item(position, dataset.read(position), ())
    finally:
        dataset.transform = transform


def _keep(*values: Any) -> Any:
    return values


def _draw_objects(item: Any, module: ImageDataModule, picture: Path) -> str:
    target = {name: value.numpy() for name, value in item.target.items()}
    draw_detections(F.to_pil_image(item.image), target, module.class_names, picture)
    labels, counts = np.unique(target["labels"], return_counts=True)
    parts = [
        f"{count} x {module.class_names[label - 1]}" for label, count in zip(labels, counts, strict=True)
    ]
    return ", ".join(parts) or "no object"


def _draw_labels(item: Any, module: ImageDataModule, picture: Path, *, normalized: bool) -> str:
    image = (
        _to_image(item.image, module.preprocessing)
        if normalized
        else F.to_pil_image(item.image.as_subclass(Tensor))
    )
    labels = np.asarray(item.labels)
    draw_classes(image, labels, module.class_names, picture)
    values, counts = np.unique(labels, return_counts=True)
    names = [*module.class_names, *["ignored"] * 256]
    order = np.argsort(-counts)
    return ", ".join(f"{names[values[i]]} {counts[i] / labels.size:.0%}" for i in order)


def _draw_classified(
    dataset: ImageDataset,
    seeded: Any,
    positions: Sequence[int],
    module: ImageDataModule,
    augmented: bool,
    out: Path,
) -> list[DrawnSample]:
    picture = out / "samples.png"
    images, titles = [], []
    for position in positions:
        if augmented:
            item = seeded[position]
            if item.bad:
                raise LightspineError(item.bad[0].reason)
            images.append(_to_image(item.image, module.preprocessing))
        else:
            images.append(dataset.read(position))
        titles.append(module.class_names[int(dataset.source.labels[position])])
    draw_image_grid(images, titles, picture)
    names = [dataset.image_name(position) for position in positions]
    return [DrawnSample(name, title, picture) for name, title in zip(names, titles, strict=True)]


def _to_image(pixels: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Return a normalized tensor (3, H, W) as an 8-bit RGB image."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return F.to_pil_image((pixels * std + mean).clamp(0, 1))
