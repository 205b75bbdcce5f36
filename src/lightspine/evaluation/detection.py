"""Evaluation of detectors."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightspine.data.detection import CocoAnnotations, DetectionDataset, collate_detection, read_coco
from lightspine.data.detection.coco_paths import find_coco
from lightspine.dense import load_network
from lightspine.dense.coco_metrics import CocoMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.dense_common import (
    ThroughputTimer,
    check_detection_options,
    check_finite,
    check_loading,
    detect_by_size,
    sort_by_size,
)
from lightspine.evaluation.report import describe_device, describe_software, hash_file
from lightspine.utils.devices import check_device
from lightspine.utils.progress import progress_bar


def evaluate_detector(
    checkpoint: str | Path,
    data: str | Path,
    *,
    images: str | Path | None = None,
    split: str | None = None,
    resize: tuple[int, int] | None = None,
    score_threshold: float | None = None,
    detections_per_image: int | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    device: str = "cpu",
    results: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score the boxes and masks of a detector as COCO does.

    Args:
        checkpoint: a file of `lightspine.dense.save_network`.
        data: a COCO file, or a folder with `annotations/instances_SPLIT.json` and the images in `SPLIT/`.
            Categories are matched with the checkpoint's classes by name.
        images: the folder of the images, where they lie elsewhere.
        split: which one of the folder; by default the first of val2017, val, validation, valid and test.
        resize: shorter and longest side that images are brought to, instead of the checkpoint's.
        score_threshold: least score of a detection that counts, instead of the checkpoint's.
        detections_per_image: most detections of an image, instead of the checkpoint's; scored with at least
            COCO's 100.
        batch_size: most images per forward pass, which are of one size: filled-up ones score otherwise.
        num_workers: processes that read images; 0 reads in this one.
        device: torch's name of the device.
        results: a file for the detections in COCO's results format.
        progress: show a bar on the standard error.

    Returns:
        The report, plain values only: `kind`, `model`, `head`, `checkpoint` and its hash, `data`, its hash,
        `images`, `objects`, `scores` (kind -> the 12 numbers in percent, None where there is nothing to
        average), `classes` (name -> kind -> AP), `skipped`, `problems` of the file, `options`, `throughput`,
        `device`, `threads`, `versions`.

    Raises:
        UsageError: no detector, unknown classes, a value out of its range.
        LightspineError: a file cannot be read or written, or no image can be used.
    """
    check_loading(batch_size, num_workers)
    check_device(device)
    overrides = {
        "resize": resize,
        "score_threshold": score_threshold,
        "detections_per_image": detections_per_image,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    check_detection_options(given)
    network, saved = load_network(checkpoint, **given)
    if saved.kind != "detector":
        raise UsageError(f"expected a detector in {checkpoint}, got {saved.head} over {saved.model}")
    check_finite(network, checkpoint)
    file, folder = find_coco(data, images, split)
    annotations = read_coco(file, folder, masks=saved.head != "retinanet", class_names=saved.class_names)
    if len(annotations.class_names) != saved.num_classes:
        raise UsageError(
            f"expected {saved.num_classes} categories in {file}, found {len(annotations.class_names)}"
        )
    most = max(saved.options.get("detections_per_image", 100), 100)
    metrics = CocoMetrics(annotations, most_detections=most)
    loader = DataLoader(
        # The true masks are scored as they stand in the file: none is drawn.
        DetectionDataset(replace(annotations, segmentations=None)),
        batch_size,
        sampler=sort_by_size(annotations.sizes),
        collate_fn=collate_detection,
        num_workers=num_workers,
    )
    clock = ThroughputTimer(device)
    skipped: dict[str, str] = {}
    network = network.to(device)
    with torch.inference_mode():
        for batch in clock.reading(progress_bar(loader, "evaluating", shown=progress)):
            skipped |= {bad.path: bad.reason for bad in batch.bad}
            with clock.taking("network"):
                found = detect_by_size(network, [image.to(device) for image in batch.images])
            with clock.taking("scoring"):
                metrics.update([int(target["image_id"]) for target in batch.targets], found)
            clock.images += len(batch.images)
    if not clock.images:
        raise LightspineError(f"none of the images of {file} can be used; {next(iter(skipped.values()))}")
    with clock.taking("scoring"):
        numbers, classes = metrics.compute(), metrics.per_class()
    if results is not None:
        metrics.write_results(results)
    return {
        "kind": saved.kind,
        "model": saved.model,
        "head": saved.head,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hash_file(checkpoint),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "data": str(file),
        "data_sha256": hash_file(file),
        "listing_sha256": hash_listing(annotations),
        "images": clock.images,
        "objects": int((~annotations.crowd).sum()),
        "scores": numbers,
        "classes": classes,
        "skipped": skipped,
        "problems": annotations.issues.sentences(),
        "options": saved.options | {"most_detections": most, "batch_size": batch_size},
        "throughput": clock.report(),
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "versions": describe_software(),
    }


def hash_listing(annotations: CocoAnnotations) -> str:
    """Return the SHA-256 of the names of the images, in hexadecimal digits."""
    return hashlib.sha256("\n".join(annotations.files).encode()).hexdigest()
