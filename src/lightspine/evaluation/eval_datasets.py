"""Evaluation datasets with labels in the class order of a checkpoint."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lightspine.data.class_mapping import ClassMapping, load_class_mapping
from lightspine.data.class_names import encode_labels
from lightspine.data.dataset import ImageDataset, collate_images
from lightspine.data.digits import CLASS_NAMES, DigitsDataset
from lightspine.data.image_folder import (
    FileSource,
    Sample,
    find_class_folders,
    list_images,
    scan_image_folder,
)
from lightspine.data.imagenet import imagenet_class_mapping, list_imagenet_val
from lightspine.data.imagenet_classes import imagenet_synsets, is_synset, synset_descriptions
from lightspine.data.shards import ShardSource
from lightspine.data.split_names import TRAIN_SPLITS, VAL_SPLITS, find_split_folder
from lightspine.data.transforms import Preprocessing, create_eval_transform
from lightspine.errors import UsageError
from lightspine.evaluation.batch_inference.sources import is_shards
from lightspine.evaluation.classifiers import class_names
from lightspine.evaluation.common import describe_split, find_held_out, find_part
from lightspine.models.metadata import ModelMetadata
from lightspine.utils.image_files import list_folders

DIGITS = "digits"
IMAGENET = "imagenet"
"""Class mapping by folder names: WordNet ids or class indices of ImageNet-1k."""


@dataclass(frozen=True, kw_only=True)
class EvalDataset:
    """Labeled images for an evaluation.

    Attributes:
        dataset: returns `Item`s, or samples for another `collate` function.
        class_names: one name per class index of the checkpoint.
        split: description of the part of the data.
        listing_sha256: SHA-256 of the lines "NAME<tab>CLASSES" of all images in order, names relative to the
            data.
        right_classes: correct classes of each label, if images may have several; `None`: a label is a class
            index.
        candidates: classes that may be predicted; default: all.
        collate: `collate_fn` of the data loader.
    """

    dataset: Dataset
    class_names: list[str]
    split: str
    listing_sha256: str
    right_classes: Sequence[tuple[int, ...]] | None = None
    candidates: tuple[int, ...] | None = None
    collate: Callable[[Any], Any] = field(default=collate_images)


def open_eval_dataset(
    data: str | Path,
    metadata: ModelMetadata,
    preprocessing: Preprocessing,
    num_classes: int,
    *,
    val_fraction: float | None = None,
    seed: int | None = None,
    class_mapping: str | Path | None = None,
) -> EvalDataset:
    """Open a labeled dataset with the checkpoint's class indices; see `evaluate` for the arguments.

    Raises:
        UsageError: the data is missing, or its classes are not the checkpoint's.
        LightspineError: a class list cannot be read.
    """
    if val_fraction is not None and (class_mapping is not None or is_shards(data)):
        raise UsageError("expected a folder of class folders for val_fraction, not shards or a class mapping")
    if str(data) == DIGITS:
        if class_mapping is not None:
            raise UsageError("expected no class mapping for the digits")
        return _open_digits(preprocessing, num_classes)
    if class_mapping is not None:
        return _open_mapped(Path(data), class_mapping, metadata, preprocessing, num_classes)
    if is_shards(data):
        return _open_shards(data, metadata, preprocessing, num_classes)
    names, samples, split = _find_samples(Path(data), metadata, num_classes, val_fraction, seed)
    _check_count(len(names), num_classes, str(data))
    return EvalDataset(
        dataset=ImageDataset(FileSource(samples), create_eval_transform(preprocessing)),
        class_names=names,
        split=split,
        listing_sha256=_hash_listing([(_relative(path, data), str(label)) for path, label in samples]),
    )


def _open_digits(preprocessing: Preprocessing, num_classes: int) -> EvalDataset:
    _check_count(len(CLASS_NAMES), num_classes, "the digits")
    dataset = DigitsDataset("test", image_size=preprocessing.input_size[1])
    labels = [(str(position), str(label)) for position, label in enumerate(dataset.labels.tolist())]
    return EvalDataset(
        dataset=dataset,
        class_names=CLASS_NAMES,
        split="test",
        listing_sha256=_hash_listing(labels),
        collate=_no_collate,
    )


def _open_mapped(
    root: Path,
    mapping_file: str | Path,
    metadata: ModelMetadata,
    preprocessing: Preprocessing,
    num_classes: int,
) -> EvalDataset:
    by_name = str(mapping_file) == IMAGENET
    mapping: ClassMapping = imagenet_class_mapping(root) if by_name else load_class_mapping(mapping_file)
    found = mapping.find(root)
    largest = max((max(image.labels) for image in found), default=0)
    if largest >= num_classes:
        raise UsageError(
            f"expected class indices below {num_classes}, the checkpoint's number of classes, in the class "
            f"mapping {mapping_file}, got {largest}"
        )
    if not found:
        raise UsageError(f"expected images with a class in {root}, but the class mapping has none for them")
    several = any(len(image.labels) > 1 for image in found)
    samples = [
        Sample(image.path, position if several else image.labels[0]) for position, image in enumerate(found)
    ]
    return EvalDataset(
        dataset=ImageDataset(FileSource(samples), create_eval_transform(preprocessing)),
        class_names=class_names(metadata, num_classes),
        split="all images of the class mapping",
        listing_sha256=_hash_listing(
            [(_relative(image.path, root), ",".join(map(str, image.labels))) for image in found]
        ),
        right_classes=[image.labels for image in found] if several else None,
        candidates=mapping.candidates,
    )


def _open_shards(
    data: str | Path, metadata: ModelMetadata, preprocessing: Preprocessing, num_classes: int
) -> EvalDataset:
    source = ShardSource(data)
    # Labels in shards are class indices, class names or, for ImageNet, WordNet ids.
    written = source.written_labels()
    names = class_names(metadata, num_classes)
    ids = (
        imagenet_synsets()
        if _has_imagenet_classes(metadata, num_classes) and is_synset(written[0])
        else names
    )
    source.labels = encode_labels(written, ids, str(data))
    part, _ = find_part(metadata.run, [source.name(position) for position in range(len(source))])
    return EvalDataset(
        dataset=ImageDataset(source, create_eval_transform(preprocessing)),
        class_names=names,
        split=describe_split(part, "all images of the shards"),
        listing_sha256=_hash_listing(
            [(Path(source.name(i)).name, str(label)) for i, label in enumerate(source.labels)]
        ),
    )


def _find_samples(
    root: Path, metadata: ModelMetadata, num_classes: int, val_fraction: float | None, seed: int | None
) -> tuple[list[str], list[Sample], str]:
    val_root = find_split_folder(root, VAL_SPLITS)
    if val_root is not None:
        if val_fraction is not None:
            raise UsageError(f"expected no val_fraction for {root}, which has a folder {val_root.name}")
        names, samples = _list_samples(val_root, metadata, num_classes)
        part, _ = find_part(metadata.run, _paths(samples))
        return names, samples, describe_split(part, val_root.name)
    held_out = find_held_out(metadata.run, val_fraction, seed)
    # Training holds out a share of a folder with training images only, too.
    folder = find_split_folder(root, TRAIN_SPLITS) or root
    names, samples = _list_samples(folder, metadata, num_classes)
    only_held_out, described = held_out.choose(metadata.run, _paths(samples))
    if only_held_out:
        names, samples = _held_out_samples(root, metadata, held_out.fraction, held_out.seed)
    return names, samples, described


def _paths(samples: list[Sample]) -> list[str]:
    return [str(path) for path, _ in samples]


def _held_out_samples(
    root: Path, metadata: ModelMetadata, val_fraction: float, seed: int
) -> tuple[list[str], list[Sample]]:
    splits = scan_image_folder(root, val_fraction=val_fraction, seed=seed)
    names = metadata.class_names or splits.class_names
    if unknown := sorted(set(splits.class_names) - set(names)):
        raise UsageError(f"class {unknown[0]} of {root} is not among the model's {len(names)} classes")
    return names, [Sample(path, names.index(splits.class_names[label])) for path, label in splits.val]


def _list_samples(root: Path, metadata: ModelMetadata, num_classes: int) -> tuple[list[str], list[Sample]]:
    if not _has_imagenet_classes(metadata, num_classes) or not root.is_dir():
        return list_images(root, metadata.class_names)
    names = class_names(metadata, num_classes)
    if not list_folders(root):
        return names, list_imagenet_val(root, imagenet_synsets())
    folders = find_class_folders(root)
    # Sorted folder names do not give the class indices: "10" precedes "2", and ids may be a subset.
    if all(is_synset(name) or name.isdecimal() for name in folders):
        found = imagenet_class_mapping(root).find(root)
        return names, [Sample(image.path, image.labels[0]) for image in found]
    return list_images(root, metadata.class_names)


def _has_imagenet_classes(metadata: ModelMetadata, num_classes: int) -> bool:
    """Return whether the classes are ImageNet-1k's; official checkpoints have 1000 classes without names."""
    if num_classes != 1000:
        return False
    return metadata.class_names in (None, synset_descriptions(imagenet_synsets()))


def _check_count(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise UsageError(f"expected the checkpoint's {expected} classes, but {where} has {found}")


def _relative(path: Path, root: str | Path) -> str:
    return path.relative_to(root).as_posix()


def _hash_listing(rows: list[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, label in rows:
        digest.update(f"{name}\t{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _no_collate(batch: Any) -> Any:
    return batch
