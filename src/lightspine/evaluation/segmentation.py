"""Evaluate segmenters on label maps or COCO masks."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightspine.data.detection import find_coco, is_coco, read_coco
from lightspine.data.segmentation import (
    IGNORED,
    CocoSemanticLabels,
    LabeledImage,
    LabelMapSource,
    SegmentationDataset,
    SlidingWindowInference,
    collate_segmentation_lists,
    create_segmentation_eval_transform,
    scan_segmentation_folder,
)
from lightspine.data.transforms import Preprocessing
from lightspine.dense import NetworkMetadata, load_network
from lightspine.dense.metrics import SegmentationMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.common import (
    FiniteLogits,
    ThroughputTimer,
    check_finite_weights,
    check_loader_options,
    describe_environment,
    hash_file,
    hash_names,
)
from lightspine.models.checkpoint import Checkpoint, read_checkpoint
from lightspine.utils.devices import check_device
from lightspine.utils.progress import progress_bar

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Image size ratios of the published multi-scale test, which also averages over horizontal flips."""


def evaluate_segmenter(
    checkpoint: str | Path | Checkpoint,
    data: str | Path,
    *,
    split: str | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    scale: tuple[int, int] | None = None,
    own_size: bool = False,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    ratios: Sequence[float] | None = None,
    flip: bool = False,
    num_workers: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a segmenter: mIoU, mAcc and aAcc.

    Args:
        checkpoint: file of `lightspine.dense.save_network`, or an opened checkpoint.
        data: folder of images and label maps (`lightspine.data.segmentation.scan_segmentation_folder`), or a
            COCO file or folder, whose masks are drawn into label maps. Its classes must be the checkpoint's.
        split: "val" (the default) or "train"; for a COCO folder the name of the split.
        val_fraction: fraction of the images held out by training, for a folder without splits.
        seed: seed of the held-out split.
        scale: longer and shorter side of the rectangle that images are resized to fit into; default: the
            checkpoint's.
        own_size: do not resize the images, as in VMamba's published multi-scale test.
        window: height and width of a sliding window; default: the checkpoint's.
        stride: vertical and horizontal stride of the window.
        ratios: image size ratios to average the probabilities over, `MULTI_SCALE` in the published test.
        flip: also average over the horizontally flipped image.
        num_workers: data loader processes; 0 loads in this process.
        device: PyTorch device.
        progress: show a progress bar on standard error.

    Returns:
        The report, JSON-serializable, as from `evaluate_detector`, but `scores` are mIoU, mAcc and aAcc in
        percent, `classes` is a list of rows, and `confusion` the confusion matrix in pixels (rows: true
        class).

    Raises:
        UsageError: not a segmenter, classes other than the checkpoint's, or a value out of range.
        LightspineError: a file cannot be read, or no image can be used.
    """
    check_loader_options(1, num_workers)
    check_device(device)
    checkpoint = read_checkpoint(checkpoint)
    network, metadata = load_network(checkpoint)
    if metadata.kind != "segmenter":
        raise UsageError(
            f"expected a segmenter in {checkpoint.label}, got {metadata.head} over {metadata.model}"
        )
    check_finite_weights(network, checkpoint.label)
    test = choose_test(metadata, window=window, stride=stride, ratios=ratios, flip=flip)
    pairs, reader, names = _open_dataset(metadata, data, split, val_fraction, seed)
    settings = choose_settings(metadata, scale=scale, own_size=own_size)
    dataset = SegmentationDataset(pairs, reader, create_transform(metadata, settings))
    loader = DataLoader(dataset, 1, collate_fn=collate_segmentation_lists, num_workers=num_workers)
    metrics, timer = SegmentationMetrics(names), ThroughputTimer(device)
    skipped: dict[str, str] = {}
    segmenter = FiniteLogits(network.to(device), checkpoint.label)
    with torch.inference_mode():
        for batch in timer.time_batches(progress_bar(loader, "evaluating", shown=progress)):
            skipped |= {bad.path: bad.reason for bad in batch.bad}
            for name, image, labels in zip(batch.names, batch.images, batch.labels, strict=True):
                with timer.measure("network"):
                    predicted = test.classify(segmenter, image.to(device), tuple(labels.shape))
                with timer.measure("scoring"):
                    metrics.update([name], [predicted.cpu()], [labels])
            timer.images += len(batch.names)
    if not timer.images:
        raise LightspineError(f"none of the images of {data} can be used; {next(iter(skipped.values()))}")
    return {
        "kind": metadata.kind,
        "model": metadata.model,
        "head": metadata.head,
        "checkpoint": checkpoint.label,
        "checkpoint_sha256": hash_file(checkpoint.label),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "data": str(data),
        "split": split or "val",
        "listing_sha256": hash_names(dataset.images),
        "images": timer.images,
        "scores": metrics.compute(),
        "classes": metrics.per_class(),
        "confusion": metrics.confusion().tolist(),
        "skipped": skipped,
        "options": metadata.options,
        "settings": settings | asdict(test),
        "throughput": timer.report(),
        **describe_environment(device),
    }


def choose_test(
    metadata: NetworkMetadata,
    *,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    ratios: Sequence[float] | None = None,
    flip: bool = False,
) -> SlidingWindowInference:
    """Return the sliding-window and test-time augmentation settings: the checkpoint's with overrides.

    Raises:
        UsageError: a value out of range.
    """
    known = metadata.settings
    test = SlidingWindowInference(
        window=tuple(known["window"]) if known.get("window") else None,
        stride=tuple(known.get("stride") or SlidingWindowInference.stride),
        ratios=tuple(known.get("ratios") or SlidingWindowInference.ratios),
        flip=bool(known.get("flip")) or flip,
    )
    if window is not None:
        # Two thirds of the window, as in the published setting: stride 341 for a window of 512.
        default_stride = max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1)
        test = replace(test, window=window, stride=stride or default_stride)
    elif stride is not None:
        test = replace(test, stride=stride)
    if ratios is not None:
        test = replace(test, ratios=tuple(ratios))
    test.check()
    return test


def choose_settings(
    metadata: NetworkMetadata, *, scale: tuple[int, int] | None = None, own_size: bool = False
) -> dict[str, Any]:
    """Return the settings that resize a segmenter's images: the checkpoint's with overrides.

    Raises:
        UsageError: both a scale and own_size.
    """
    if own_size and scale is not None:
        raise UsageError(f"expected either own_size or a scale, got both ({list(scale)})")
    return metadata.settings | ({"scale": list(scale)} if scale else {"scale": None} if own_size else {})


def create_transform(metadata: NetworkMetadata, settings: dict[str, Any]) -> Any:
    """Create the evaluation transform of an image and its labels."""
    scale = settings.get("scale")
    return create_segmentation_eval_transform(
        Preprocessing.from_config(metadata.preprocessing),
        scale=None if scale is None else (scale[0], scale[1]),
        divisor=settings.get("divisor", 1),
    )


def _open_dataset(
    metadata: NetworkMetadata, data: str | Path, split: str | None, val_fraction: float, seed: int
) -> tuple[Sequence[LabeledImage], LabelMapSource, list[str]]:
    """Return image and label pairs, the label reader and the class names."""
    pairs: Sequence[LabeledImage]
    reader: LabelMapSource
    if is_coco(data):
        expected = None if metadata.class_names is None else metadata.class_names[1:]
        coco_labels = CocoSemanticLabels(read_coco(*find_coco(data, split=split), class_names=expected))
        pairs, reader, names = coco_labels.pairs(), coco_labels, coco_labels.class_names
    else:
        if split not in (None, "train", "val"):
            raise UsageError(f"expected the split train or val of {data}, got {split!r}")
        unnamed = metadata.class_names == [str(number) for number in range(metadata.num_classes)]
        # JSON turns integer keys into strings.
        remap = {int(value): number for value, number in (metadata.settings.get("remap") or {}).items()}
        splits = scan_segmentation_folder(
            data,
            num_classes=metadata.num_classes if unnamed else None,
            ignored=metadata.settings.get("ignored", IGNORED),
            remap=remap or None,
            val_fraction=val_fraction,
            seed=seed,
        )
        pairs, reader, names = getattr(splits, split or "val"), splits.reader, splits.class_names
    if len(names) != metadata.num_classes:
        raise UsageError(
            f"expected the {metadata.num_classes} classes of the checkpoint in {data}, got {len(names)}"
        )
    for number, (known, name) in enumerate(zip(metadata.class_names or names, names, strict=True)):
        if known != name:
            raise UsageError(
                f"expected the classes of the checkpoint in {data}, but class {number} is {name!r} there and "
                f"{known!r} in the checkpoint"
            )
    return pairs, reader, names
