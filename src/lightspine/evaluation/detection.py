"""Evaluate detectors on COCO annotations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightspine.data.detection import (
    CocoAnnotations,
    DetectionDataset,
    collate_detection,
    find_coco,
    hold_out,
    read_coco,
)
from lightspine.data.loader import WatchedLoader
from lightspine.dense import NetworkMetadata, load_network
from lightspine.dense.inference import detect_by_size
from lightspine.dense.metrics import CocoMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.common import (
    HeldOut,
    ThroughputTimer,
    check_finite_weights,
    check_loader_options,
    describe_environment,
    describe_split,
    describe_weights,
    find_held_out,
    find_part,
    hash_file,
    hash_names,
)
from lightspine.export.onnx_network import is_onnx_file, load_onnx_detector
from lightspine.models.checkpoint import Checkpoint, Weights, read_checkpoint
from lightspine.utils.devices import check_device
from lightspine.utils.progress import progress_bar
from lightspine.utils.resource_errors import resource_errors


@resource_errors()
def evaluate_detector(
    checkpoint: str | Path | Checkpoint,
    data: str | Path,
    *,
    weights: Weights = "auto",
    images: str | Path | None = None,
    split: str | None = None,
    val_fraction: float | None = None,
    seed: int | None = None,
    resize: tuple[int, int] | None = None,
    score_threshold: float | None = None,
    detections_per_image: int | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    device: str = "cpu",
    results: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate the boxes and masks of a detector with COCO's metrics.

    Args:
        checkpoint: `.safetensors`, `.ckpt` or exported `.onnx` file of a detector, or an opened checkpoint.
        data: COCO file or folder; see `lightspine.data.detection.list_coco_splits`. Categories are matched
            with the checkpoint's classes by name.
        weights: "model" (as trained), "ema" (their average), or "auto" for the ones that the run validated.
        images: image folder, if it is not next to `annotations`.
        split: split of the folder; default: the first of val2017, val, validation, valid and test.
        val_fraction: for a folder with training images only; see `evaluate_segmenter`.
        seed: see `evaluate_segmenter`.
        resize: shorter side and maximum longer side of the images; default: the checkpoint's.
        score_threshold: minimum score of a detection; default: the checkpoint's.
        detections_per_image: maximum number of detections per image; default: the checkpoint's. At least
            COCO's 100 are evaluated.
        batch_size: maximum number of images per forward pass. All images of a batch have the same size,
            because padding would change the detections.
        num_workers: data loader processes; 0 loads in this process.
        device: PyTorch device.
        results: file for the detections in COCO's results format.
        progress: show a progress bar on standard error.

    Returns:
        The report, JSON-serializable: `kind`, `model`, `head`, `checkpoint` and its hash, `weights` ("ema" or
        "raw"; None for a file with a single set of weights), `parameters`, `data` and its hash, `split`,
        `listing_sha256`, `images`, `objects`, `scores` (kind -> 12 metrics in percent, None if there is
        nothing to average), `classes` (name -> kind -> AP), `best_f1` (name -> kind -> precision, recall, F1
        and score threshold where F1 at IoU 0.5 is highest), `skipped` (path -> reason), `problems` of the
        annotations, `options`, `throughput`, `device`, `threads`, `versions`.

    Raises:
        UsageError: not a detector, categories other than the checkpoint's, or a value out of range.
        LightspineError: a file cannot be read or written, or no image can be used.
    """
    check_loader_options(batch_size, num_workers)
    check_device(device)
    overrides = {
        "resize": resize,
        "score_threshold": score_threshold,
        "detections_per_image": detections_per_image,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    check_detection_options(overrides)
    network, metadata, label = open_detector(checkpoint, weights=weights, **overrides)
    file, folder = find_coco(data, images, split)
    annotations = read_coco(
        file, folder, masks=metadata.head != "retinanet", class_names=metadata.class_names
    )
    annotations, described = choose_images(
        annotations, metadata.run, split or folder.name, find_held_out(metadata.run, val_fraction, seed)
    )
    if len(annotations.class_names) != metadata.num_classes:
        raise UsageError(
            f"expected {metadata.num_classes} categories in {file}, found {len(annotations.class_names)}"
        )
    max_detections = max(metadata.options.get("detections_per_image", 100), 100)
    metrics = CocoMetrics(annotations, max_detections=max_detections)
    loader = WatchedLoader(
        # Ground truth masks are evaluated as RLE, so the dataset need not decode them.
        DetectionDataset(replace(annotations, segmentations=None)),
        batch_size,
        sampler=sort_by_size(annotations.sizes),
        collate_fn=collate_detection,
        num_workers=num_workers,
    )
    timer = ThroughputTimer(device)
    skipped: dict[str, str] = {}
    network = network.to(device)
    with torch.inference_mode():
        for batch in timer.time_batches(progress_bar(loader, "evaluating", shown=progress)):
            skipped |= {bad.path: bad.reason for bad in batch.bad}
            with timer.measure("network"):
                found = detect_by_size(network, [image.to(device) for image in batch.images])
            with timer.measure("scoring"):
                metrics.update([int(target["image_id"]) for target in batch.targets], found)
            timer.images += len(batch.images)
    if not timer.images:
        raise LightspineError(f"none of the images of {file} can be used; {next(iter(skipped.values()))}")
    with timer.measure("scoring"):
        scores, classes = metrics.compute(), metrics.per_class()
    if results is not None:
        metrics.write_results(results)
    return {
        "kind": metadata.kind,
        "model": metadata.model,
        "head": metadata.head,
        "checkpoint": label,
        "checkpoint_sha256": hash_file(label),
        "weights": describe_weights(network),
        # An exported network has constants instead of parameters.
        "parameters": sum(parameter.numel() for parameter in network.parameters()) or None,
        "data": str(file),
        "data_sha256": hash_file(file),
        "split": described,
        "listing_sha256": hash_names(annotations.files),
        "images": timer.images,
        "objects": int((~annotations.crowd).sum()),
        "scores": scores,
        "classes": classes,
        "best_f1": metrics.best_f1(),
        "skipped": skipped,
        "problems": annotations.issues.sentences(),
        "options": metadata.options | {"max_detections": max_detections, "batch_size": batch_size},
        "throughput": timer.report(),
        **describe_environment(device),
    }


def open_detector(
    source: str | Path | Checkpoint, *, weights: Weights = "auto", **options: Any
) -> tuple[Any, NetworkMetadata, str]:
    """Load a detector in evaluation mode.

    Args:
        source: `.safetensors`, `.ckpt` or exported `.onnx` file, or an opened checkpoint.
        weights: see `lightspine.dense.load_network`.
        **options: arguments of the head that replace those in the file; an exported file takes a higher
            `score_threshold` and fewer `detections_per_image` than it has.

    Returns:
        The network, its metadata, and the path of the file.

    Raises:
        UsageError: not a detector, weights that the file does not have, or options that it does not take.
        LightspineError: the file cannot be read, or holds weights that are not finite.
    """
    if not isinstance(source, Checkpoint) and is_onnx_file(source):
        if weights != "auto":
            raise UsageError(f"expected weights='auto' for the exported file {source}, got {weights!r}")
        if "resize" in options:
            raise UsageError(
                f"expected no resize for {source}, which resizes as it was exported, got {options['resize']}"
            )
        return *load_onnx_detector(source, **options), str(source)
    checkpoint = read_checkpoint(source)
    network, metadata = load_network(checkpoint, weights=weights, **options)
    if metadata.kind != "detector":
        raise UsageError(
            f"expected a detector in {checkpoint.label}, got {metadata.head} over {metadata.model}"
        )
    check_finite_weights(network, checkpoint.label)
    return network, metadata, checkpoint.label


def choose_images(
    annotations: CocoAnnotations, run: dict[str, Any], name: str, held_out: HeldOut
) -> tuple[CocoAnnotations, str]:
    """Return the images of a COCO file to evaluate on, and the description of the split.

    Args:
        annotations: annotations of all images of the file.
        run: `NetworkMetadata.run` of the checkpoint.
        name: name of the split of the file.
        held_out: how to split the file if the training held out a share of it.
    """
    images = [str(annotations.path(position)) for position in range(len(annotations))]
    part, _ = find_part(run, images)
    if not held_out.requested and part != "all":
        return annotations, describe_split(part, name)
    _, described = held_out.choose(run, images)
    return hold_out(annotations, held_out.fraction, held_out.seed)[1], described


def check_detection_options(options: dict[str, Any]) -> None:
    """Check options that override those of the checkpoint.

    Raises:
        UsageError: a score outside 0 to 1, detections_per_image below 1, or an invalid resize.
    """
    score, count = options.get("score_threshold", 0.0), options.get("detections_per_image", 1)
    shorter, longest = options.get("resize", (1, 1))
    if not 0 <= score <= 1:
        raise UsageError(f"expected a score_threshold from 0 to 1, got {score}")
    if count < 1:
        raise UsageError(f"expected detections_per_image of at least 1, got {count}")
    if not 1 <= shorter <= longest:
        raise UsageError(
            f"expected a resize of at least 1 px, the shorter side first, got {shorter} and {longest}"
        )


def sort_by_size(sizes: np.ndarray) -> list[int]:
    """Return image positions grouped by size, largest first, so that out-of-memory errors occur early.

    Args:
        sizes: (images, 2), height and width.
    """
    keys = (sizes[:, 1], sizes[:, 0], sizes.prod(axis=1))
    order: list[int] = np.lexsort(keys)[::-1].tolist()
    return order
