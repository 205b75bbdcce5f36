"""Evaluation of segmenters."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightspine.data.detection import read_coco
from lightspine.data.detection.coco_paths import find_coco, is_coco
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
from lightspine.dense.segmentation_metrics import SegmentationMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.dense_common import FiniteLogits, ThroughputTimer, check_finite, check_loading
from lightspine.evaluation.report import describe_device, describe_software, hash_file
from lightspine.utils.devices import check_device
from lightspine.utils.progress import progress_bar

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Factors of the image's size in the published tests at several sizes, which mirror the image too."""


def evaluate_segmenter(
    checkpoint: str | Path,
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
    """Score the class maps of a segmenter: mIoU, mAcc and aAcc.

    Args:
        checkpoint: a file of `lightspine.dense.save_network`.
        data: a folder of images and label maps (`lightspine.data.segmentation.scan_segmentation_folder`), or
            a COCO file or folder, whose masks are painted. Its classes must be the checkpoint's.
        split: "val" (the default) or "train"; of a COCO folder the name of the split.
        val_fraction: share that was held out in training, for a folder without splits.
        seed: of the held-out share.
        scale: longer and shorter side of the rectangle that images are resized to fit into, instead of the
            checkpoint's.
        own_size: leave the images at their own size, as the published test at several sizes of VMamba does.
        window: height and width of a sliding window, instead of the checkpoint's.
        stride: of the window, down and across.
        ratios: factors of the image's size whose probabilities are averaged; `MULTI_SCALE` is the published
            test at several sizes.
        flip: average over the mirrored image too.
        num_workers: processes that read images; 0 reads in this one.
        device: torch's name of the device.
        progress: show a bar on the standard error.

    Returns:
        The report, plain values only: as of `evaluate_detector`, but `scores` are mIoU, mAcc and aAcc in
        percent, `classes` a list of rows, and `confusion` holds the pixels (rows: true class).

    Raises:
        UsageError: no segmenter, other classes, a value out of its range.
        LightspineError: a file cannot be read, or no image can be used.
    """
    check_loading(1, num_workers)
    check_device(device)
    network, saved = load_network(checkpoint)
    if saved.kind != "segmenter":
        raise UsageError(f"expected a segmenter in {checkpoint}, got {saved.head} over {saved.model}")
    check_finite(network, checkpoint)
    test = choose_test(saved, window=window, stride=stride, ratios=ratios, flip=flip)
    pairs, reader, names = _open(saved, data, split, val_fraction, seed)
    settings = choose_settings(saved, scale=scale, own_size=own_size)
    dataset = SegmentationDataset(pairs, reader, eval_transform(saved, settings))
    loader = DataLoader(dataset, 1, collate_fn=collate_segmentation_lists, num_workers=num_workers)
    metrics, clock = SegmentationMetrics(names), ThroughputTimer(device)
    skipped: dict[str, str] = {}
    segmenter = FiniteLogits(network.to(device), checkpoint)
    with torch.inference_mode():
        for batch in clock.reading(progress_bar(loader, "evaluating", shown=progress)):
            skipped |= {bad.path: bad.reason for bad in batch.bad}
            for name, image, labels in zip(batch.names, batch.images, batch.labels, strict=True):
                with clock.taking("network"):
                    found = test.classify(segmenter, image.to(device), tuple(labels.shape))
                with clock.taking("scoring"):
                    metrics.update([name], [found.cpu()], [labels])
            clock.images += len(batch.names)
    if not clock.images:
        raise LightspineError(f"none of the images of {data} can be used; {next(iter(skipped.values()))}")
    return {
        "kind": saved.kind,
        "model": saved.model,
        "head": saved.head,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hash_file(checkpoint),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "data": str(data),
        "split": split or "val",
        "listing_sha256": hashlib.sha256("\n".join(dataset.images).encode()).hexdigest(),
        "images": clock.images,
        "scores": metrics.compute(),
        "classes": metrics.per_class(),
        "confusion": metrics.confusion().tolist(),
        "skipped": skipped,
        "options": saved.options,
        "settings": settings | asdict(test),
        "throughput": clock.report(),
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "versions": describe_software(),
    }


def choose_test(
    saved: NetworkMetadata,
    *,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    ratios: Sequence[float] | None = None,
    flip: bool = False,
) -> SlidingWindowInference:
    """Return how a segmenter looks at images: as its file says, or as asked for.

    Raises:
        UsageError: a value out of its range.
    """
    known = saved.settings
    test = SlidingWindowInference(
        window=tuple(known["window"]) if known.get("window") else None,
        stride=tuple(known.get("stride") or SlidingWindowInference.stride),
        ratios=tuple(known.get("ratios") or SlidingWindowInference.ratios),
        flip=bool(known.get("flip")) or flip,
    )
    if window is not None:
        # Two thirds of the window, as the published stride of 341 is of 512.
        usual = max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1)
        test = replace(test, window=window, stride=stride or usual)
    elif stride is not None:
        test = replace(test, stride=stride)
    if ratios is not None:
        test = replace(test, ratios=tuple(ratios))
    test.check()
    return test


def choose_settings(
    saved: NetworkMetadata, *, scale: tuple[int, int] | None = None, own_size: bool = False
) -> dict[str, Any]:
    """Return how a segmenter's images are prepared: as its file says, or as asked for.

    Raises:
        UsageError: both a scale and the images' own size.
    """
    if own_size and scale is not None:
        raise UsageError(f"expected either own_size or a scale, got both ({list(scale)})")
    return saved.settings | ({"scale": list(scale)} if scale else {"scale": None} if own_size else {})


def eval_transform(saved: NetworkMetadata, settings: dict[str, Any]) -> Any:
    """Return what turns an image and its labels into the segmenter's input."""
    scale = settings.get("scale")
    return create_segmentation_eval_transform(
        Preprocessing.from_config(saved.preprocessing),
        scale=None if scale is None else (scale[0], scale[1]),
        divisor=settings.get("divisor", 1),
    )


def _open(
    saved: NetworkMetadata, data: str | Path, split: str | None, val_fraction: float, seed: int
) -> tuple[Sequence[LabeledImage], LabelMapSource, list[str]]:
    pairs: Sequence[LabeledImage]
    reader: LabelMapSource
    if is_coco(data):
        expected = None if saved.class_names is None else saved.class_names[1:]
        painted = CocoSemanticLabels(read_coco(*find_coco(data, split=split), class_names=expected))
        pairs, reader, names = painted.pairs(), painted, painted.class_names
    else:
        if split not in (None, "train", "val"):
            raise UsageError(f"expected the split train or val of {data}, got {split!r}")
        unnamed = saved.class_names == [str(number) for number in range(saved.num_classes)]
        # JSON has no numbers for keys.
        remap = {int(value): number for value, number in (saved.settings.get("remap") or {}).items()}
        splits = scan_segmentation_folder(
            data,
            num_classes=saved.num_classes if unnamed else None,
            ignored=saved.settings.get("ignored", IGNORED),
            remap=remap or None,
            val_fraction=val_fraction,
            seed=seed,
        )
        pairs, reader, names = getattr(splits, split or "val"), splits.reader, splits.class_names
    if len(names) != saved.num_classes:
        raise UsageError(
            f"expected the {saved.num_classes} classes of the checkpoint in {data}, got {len(names)}"
        )
    for number, (known, name) in enumerate(zip(saved.class_names or names, names, strict=True)):
        if known != name:
            raise UsageError(
                f"expected the classes of the checkpoint in {data}, but class {number} is {name!r} there and "
                f"{known!r} in the checkpoint"
            )
    return pairs, reader, names
