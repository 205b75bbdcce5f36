"""Evaluate and predict with classifiers."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightspine.data.dataset import Batch
from lightspine.data.loader import WatchedLoader
from lightspine.data.transforms import create_eval_transform
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.classifiers import Weights, class_names, find_preprocessing, load_classifier
from lightspine.evaluation.common import (
    check_loader_options,
    describe_environment,
    describe_weights,
    hash_file,
)
from lightspine.evaluation.eval_datasets import open_eval_dataset
from lightspine.evaluation.metrics import ClassificationMetrics
from lightspine.models.checkpoint import Checkpoint
from lightspine.utils.devices import check_device, synchronize
from lightspine.utils.image_files import open_image
from lightspine.utils.progress import progress_bar
from lightspine.utils.resource_errors import resource_errors

_MAX_REPORTED_CONFUSION_CLASSES = 200
"""Largest confusion matrix in the report; `classes.csv` has the most frequent confusion of every class."""


@resource_errors()
def evaluate(
    model: str | Path | Checkpoint,
    data: str | Path,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    weights: Weights = "auto",
    val_fraction: float | None = None,
    seed: int | None = None,
    class_mapping: str | Path | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a classifier: top-1, top-5, loss, per-class accuracy, confusion matrix and throughput.

    Args:
        model: a checkpoint, an exported `.onnx` file, or a model name together with `checkpoint`.
        data: folder `val/CLASS/*` or `CLASS/*`, whose folder names are matched with the checkpoint's class
            names and may be a subset of them. For ImageNet's 1000 classes the folders may be named by WordNet
            ids or class indices, and `val` may be flat with a list of labels next to it
            (`lightspine.data.imagenet.list_imagenet_val`). Or shards: a `.tar` file, a pattern such as
            `val-{000..012}.tar`, or a folder of them. Or "digits" for the test split of the digits.
        checkpoint: the weights for a model name.
        weights: "model" (as trained), "ema" (their average), or "auto" for the ones whose score is published.
        val_fraction: evaluate only the validation split of `CLASS/*`, as training splits it with the same
            fraction and seed; default: the images that the training held out, if the checkpoint was trained
            on this folder, else all images.
        seed: seed of the validation split; default: that of the training.
        class_mapping: file that maps folders or images to classes (`lightspine.data.load_class_mapping`), or
            "imagenet" for folders named by WordNet ids or class indices. If it covers a subset of the
            classes, only these may be predicted, as for ImageNet-A and -R.
        image_size: height and width in pixels; default: the checkpoint's.
        crop_pct: see `find_preprocessing`; default: the checkpoint's.
        crop_mode: see `find_preprocessing`; default: the checkpoint's.
        batch_size: images per forward pass.
        num_workers: data loader processes; 0 loads in this process.
        device: PyTorch device.
        progress: show a progress bar on standard error.

    Returns:
        The report, JSON-serializable: `model`, `checkpoint`, `checkpoint_sha256`, `weights` ("ema" or "raw";
        None for a file with a single set of weights), `parameters`, `data`, `split`, `listing_sha256` (of
        image names and classes), `images`;
        `top1` and `top5` in percent (`top5` is None with five classes or fewer), `loss`, `macro_recall`,
        `macro_precision`, `macro_f1` and `majority_baseline`, see `ClassificationMetrics`;
        `classes` (`images`, `top1`, `top5`, `precision`, `f1`, `predicted`, `confused_with` per
        class; None, like the loss, if images may have several correct classes);
        `confusion` (rows: true class, columns: predicted class; None above 200 classes);
        `candidates` (number of classes that may be predicted); `skipped` (path -> reason); `preprocessing`;
        `loaded` (load report of the checkpoint);
        `throughput` (`images_per_second` with data loading, `model_images_per_second` without; both exclude
        the first of several batches); `arguments` of this call; `device`, `threads`; `versions`.

    Raises:
        UsageError: an invalid model, folder, class or value.
        LightspineError: the checkpoint or every image cannot be read, or the model gives non-finite values.
    """
    arguments = {
        key: str(value)
        if isinstance(value, Path)
        else value.label
        if isinstance(value, Checkpoint)
        else value
        for key, value in locals().items()
    }
    check_loader_options(batch_size, num_workers)
    check_device(device)
    file = arguments["checkpoint"] or arguments["model"]
    network, metadata = load_classifier(model, checkpoint, weights=weights)
    preprocessing = find_preprocessing(
        metadata, image_size=image_size, crop_pct=crop_pct, crop_mode=crop_mode
    )
    num_classes = int(getattr(network, "num_classes", 0))
    if num_classes < 2:
        raise UsageError(f"expected a checkpoint with a classifier, but {file} has none")
    images = open_eval_dataset(
        data,
        metadata,
        preprocessing,
        num_classes,
        val_fraction=val_fraction,
        seed=seed,
        class_mapping=class_mapping,
    )
    loader = WatchedLoader(images.dataset, batch_size, collate_fn=images.collate, num_workers=num_workers)
    metrics = ClassificationMetrics(
        num_classes, right_classes=images.right_classes, candidates=images.candidates
    )
    batches = progress_bar(loader, "evaluating", shown=progress)
    run = _score_batches(network.to(device), batches, metrics, device)
    if metrics.num_images == 0:
        raise LightspineError(f"none of the images of {data} can be used; {next(iter(run.skipped.values()))}")
    report = getattr(network, "load_report", None)
    has_confusion = metrics.confusion is not None and num_classes <= _MAX_REPORTED_CONFUSION_CLASSES
    return {
        "model": metadata.name,
        "checkpoint": file,
        "checkpoint_sha256": hash_file(file),
        "weights": describe_weights(network),
        # An exported network has constants instead of parameters.
        "parameters": sum(parameter.numel() for parameter in network.parameters()) or None,
        "data": str(data),
        "split": images.split,
        "listing_sha256": images.listing_sha256,
        "images": metrics.num_images,
        **metrics.compute(),
        "classes": metrics.per_class(images.class_names),
        "confusion": metrics.confusion.tolist() if has_confusion and metrics.confusion is not None else None,
        "candidates": metrics.num_candidates,
        "skipped": run.skipped,
        "preprocessing": preprocessing.to_dict(),
        "loaded": str(report or ""),
        "throughput": run.throughput(),
        "arguments": arguments,
        **describe_environment(device),
    }


@dataclass
class _Run:
    """Skipped images, and (images, total seconds, model seconds) of each batch."""

    skipped: dict[str, str] = field(default_factory=dict)
    timed: list[tuple[int, float, float]] = field(default_factory=list)

    def throughput(self) -> dict[str, float]:
        # The first batch warms up.
        timed = self.timed[1:] or self.timed
        count = sum(images for images, _, _ in timed)
        return {
            "images_per_second": round(count / sum(total for _, total, _ in timed), 2),
            "model_images_per_second": round(count / sum(forward for _, _, forward in timed), 2),
        }


def _score_batches(
    network: nn.Module, batches: Iterable[Batch], metrics: ClassificationMetrics, device: str
) -> _Run:
    run = _Run()
    with _evaluation_mode(network), torch.inference_mode():
        started = time.perf_counter()
        for images, labels, bad in batches:
            run.skipped.update((image.path, image.reason) for image in bad)
            if len(images) == 0:
                continue
            loaded = time.perf_counter()
            logits = network(images.to(device))
            synchronize(device)
            forward = time.perf_counter() - loaded
            metrics.update(logits.float().cpu(), labels)
            ended = time.perf_counter()
            run.timed.append((len(images), ended - started, forward))
            started = ended
    return run


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


@dataclass(frozen=True)
class ClassScore:
    """A class name and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The top classes of one image, most probable first."""

    path: Path
    classes: list[ClassScore]


@resource_errors()
def predict(
    model: str | Path | Checkpoint,
    images: Iterable[str | Path],
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    weights: Weights = "auto",
    topk: int = 5,
    image_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    device: str = "cpu",
) -> list[Prediction]:
    """Predict the top classes of image files.

    Args:
        model: a checkpoint, an exported `.onnx` file, or a model name together with `checkpoint`.
        images: image files.
        checkpoint: the weights for a model name.
        weights: "model" (as trained), "ema" (their average), or "auto" for the ones whose score is published.
        topk: number of classes, limited to those of the model.
        image_size: height and width in pixels; default: the checkpoint's.
        crop_pct: see `lightspine.evaluation.classifiers.find_preprocessing`.
        crop_mode: see `lightspine.evaluation.classifiers.find_preprocessing`.
        device: PyTorch device.

    Returns:
        One prediction per image, in the order of `images`.

    Raises:
        UsageError: a model name without a checkpoint, a missing or too small image, or topk below 1.
        LightspineError: an image or the checkpoint cannot be read; the message names it.

    Examples:
        >>> from lightspine.evaluation import predict
        >>> for prediction in predict("runs/digits/model.safetensors", ["seven.png"]):  # doctest: +SKIP
        ...     print(prediction.path, prediction.classes[0].name)
    """
    if topk < 1:
        raise UsageError(f"expected topk of at least 1, got {topk}")
    check_device(device)
    network, metadata = load_classifier(model, checkpoint, weights=weights)
    network = network.to(device)
    transform = create_eval_transform(
        find_preprocessing(metadata, image_size=image_size, crop_pct=crop_pct, crop_mode=crop_mode)
    )
    names: list[str] | None = None
    predictions = []
    for path in images:
        # One image at a time: an unreadable file raises before the next ones are read.
        pixels = transform(open_image(path)).unsqueeze(0).to(device)
        with torch.inference_mode():
            probabilities = network(pixels)[0].float().softmax(dim=-1)
        names = names or class_names(metadata, len(probabilities))
        top = probabilities.topk(min(topk, len(probabilities)))
        scores = [
            ClassScore(names[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        predictions.append(Prediction(Path(path), scores))
    return predictions
