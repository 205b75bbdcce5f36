"""Evaluate segmenters on label maps or COCO masks."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lightspine.data.detection import find_coco, is_coco, read_coco
from lightspine.data.loader import WatchedLoader
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
from lightspine.data.split_record import are_of_one_folder
from lightspine.data.transforms import Preprocessing
from lightspine.dense import NetworkMetadata, load_network
from lightspine.dense.metrics import SegmentationMetrics
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.common import (
    FiniteLogits,
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
from lightspine.evaluation.detection import choose_images
from lightspine.export.onnx_network import is_onnx_file, load_onnx_segmenter
from lightspine.models.checkpoint import Checkpoint, Weights, read_checkpoint
from lightspine.utils.devices import check_device
from lightspine.utils.progress import progress_bar
from lightspine.utils.resource_errors import resource_errors

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Image size ratios of the published multi-scale test, which also averages over horizontal flips."""


@resource_errors()
def evaluate_segmenter(
    checkpoint: str | Path | Checkpoint,
    data: str | Path,
    *,
    weights: Weights = "auto",
    split: str | None = None,
    val_fraction: float | None = None,
    seed: int | None = None,
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
        checkpoint: `.safetensors`, `.ckpt` or exported `.onnx` file of a segmenter, or an opened checkpoint.
        data: folder of images and label maps (`lightspine.data.segmentation.scan_segmentation_folder`), or a
            COCO file or folder, whose masks are drawn into label maps. Its classes must be the checkpoint's.
        weights: see `evaluate_detector`.
        split: "val" (the default) or "train"; for a COCO folder the name of the split.
        val_fraction: for data without splits: evaluate only this fraction, held out as by the training with
            the same seed; default: the images that the training held out, if the checkpoint was trained on
            this data, else all images.
        seed: seed of the held-out split; default: that of the training.
        scale: shorter and longer side of the rectangle that images are resized to fit into; default: the
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
        percent, `majority_baseline` those of always predicting the largest class, `classes` is a list of
        rows, and `confusion` the confusion matrix in pixels (rows: true
        class).

    Raises:
        UsageError: not a segmenter, classes other than the checkpoint's, or a value out of range.
        LightspineError: a file cannot be read, or no image can be used.
    """
    check_loader_options(1, num_workers)
    check_device(device)
    network, metadata, label = open_segmenter(checkpoint, weights=weights)
    test = choose_test(metadata, window=window, stride=stride, ratios=ratios, flip=flip)
    pairs, reader, names, described = _open_dataset(metadata, data, split, val_fraction, seed)
    settings = choose_settings(metadata, scale=scale, own_size=own_size)
    dataset = SegmentationDataset(pairs, reader, create_transform(metadata, settings))
    loader = WatchedLoader(dataset, 1, collate_fn=collate_segmentation_lists, num_workers=num_workers)
    metrics, timer = SegmentationMetrics(names), ThroughputTimer(device)
    skipped: dict[str, str] = {}
    segmenter = FiniteLogits(network.to(device), label)
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
        "checkpoint": label,
        "checkpoint_sha256": hash_file(label),
        "weights": describe_weights(network),
        # An exported network has constants instead of parameters.
        "parameters": sum(parameter.numel() for parameter in network.parameters()) or None,
        "data": str(data),
        "split": described,
        "listing_sha256": hash_names(dataset.images),
        "images": timer.images,
        "scores": metrics.compute(),
        "majority_baseline": metrics.majority_baseline(),
        "classes": metrics.per_class(),
        "confusion": metrics.confusion().tolist(),
        "skipped": skipped,
        "options": metadata.options,
        "settings": settings | asdict(test),
        "throughput": timer.report(),
        **describe_environment(device),
    }


def open_segmenter(
    source: str | Path | Checkpoint, *, weights: Weights = "auto"
) -> tuple[Any, NetworkMetadata, str]:
    """Load a segmenter in evaluation mode.

    Args:
        source: `.safetensors`, `.ckpt` or exported `.onnx` file, or an opened checkpoint.
        weights: see `lightspine.dense.load_network`.

    Returns:
        The network, its metadata, and the path of the file.

    Raises:
        UsageError: not a segmenter, or weights that the file does not have.
        LightspineError: the file cannot be read, or holds weights that are not finite.
    """
    if not isinstance(source, Checkpoint) and is_onnx_file(source):
        if weights != "auto":
            raise UsageError(f"expected weights='auto' for the exported file {source}, got {weights!r}")
        return *load_onnx_segmenter(source), str(source)
    checkpoint = read_checkpoint(source)
    network, metadata = load_network(checkpoint, weights=weights)
    if metadata.kind != "segmenter":
        raise UsageError(
            f"expected a segmenter in {checkpoint.label}, got {metadata.head} over {metadata.model}"
        )
    check_finite_weights(network, checkpoint.label)
    return network, metadata, checkpoint.label


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
        # Segmenters of files without it were trained and evaluated with one resize.
        resize_twice=settings.get("resize_twice", False),
    )


def _open_dataset(
    metadata: NetworkMetadata,
    data: str | Path,
    split: str | None,
    val_fraction: float | None,
    seed: int | None,
) -> tuple[Sequence[LabeledImage], LabelMapSource, list[str], str]:
    """Return image and label pairs, the label reader, the class names and the description of the split."""
    opened = _open_coco if is_coco(data) else _open_folder
    held_out = find_held_out(metadata.run, val_fraction, seed)
    pairs, reader, names, described = opened(metadata, data, split, held_out)
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
    return pairs, reader, names, described


def _open_coco(
    metadata: NetworkMetadata, data: str | Path, split: str | None, held_out: HeldOut
) -> tuple[list[LabeledImage], LabelMapSource, list[str], str]:
    expected = None if metadata.class_names is None else metadata.class_names[1:]
    file, folder = find_coco(data, split=split)
    annotations, described = choose_images(
        read_coco(file, folder, class_names=expected), metadata.run, split or folder.name, held_out
    )
    labels = CocoSemanticLabels(annotations)
    return labels.pairs(), labels, labels.class_names, described


def _open_folder(
    metadata: NetworkMetadata, data: str | Path, split: str | None, held_out: HeldOut
) -> tuple[list[LabeledImage], LabelMapSource, list[str], str]:
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
        default_names=metadata.class_names,
        val_fraction=held_out.fraction,
        seed=held_out.seed,
    )
    has_splits = not are_of_one_folder(_images(splits.train), _images(splits.val))
    if has_splits and held_out.requested:
        raise UsageError(f"expected no val_fraction for {data}, which has the splits train and val")
    everything = sorted([*splits.train, *splits.val])
    pairs = splits.train if split == "train" else splits.val
    if split is None and not has_splits:
        only_held_out, described = held_out.choose(metadata.run, _images(everything))
        pairs = splits.val if only_held_out else everything
    else:
        part, _ = find_part(metadata.run, _images(pairs))
        described = describe_split(part, split or "val")
    return pairs, splits.reader, splits.class_names, described


def _images(pairs: Sequence[LabeledImage]) -> list[str]:
    return [str(pair.image) for pair in pairs]
