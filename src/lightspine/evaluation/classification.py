"""Evaluation of and prediction with classifiers."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightspine.data.dataset import Batch
from lightspine.data.transforms import create_eval_transform
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.classifiers import Weights, class_names, find_preprocessing, load_classifier
from lightspine.evaluation.eval_datasets import open_eval_dataset
from lightspine.evaluation.metrics import LARGEST_REPORTED, ClassificationMetrics
from lightspine.evaluation.report import describe_device, describe_software, hash_file
from lightspine.utils.devices import check_device, synchronize
from lightspine.utils.image_files import open_image
from lightspine.utils.progress import progress_bar


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    checkpoint: str | Path | None = None,
    weights: Weights = "auto",
    val_fraction: float | None = None,
    seed: int = 0,
    class_mapping: str | Path | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Measure how often a checkpoint is right.

    Args:
        model: a checkpoint file, or the name of a model together with `checkpoint`.
        data: a folder `val/CLASS/*` or `CLASS/*`; the folders' names are matched with the class names of the
            checkpoint, so a folder with some of its classes will do. For ImageNet's 1000 classes the folders
            may be called by WordNet ids or class numbers, and `val` may be flat with its list beside it
            (`lightspine.data.imagenet.list_imagenet_val`). Or shards: a `.tar` file, a pattern such as
            `val-{000..012}.tar`, a folder of them. Or "digits" for the held-out digits.
        checkpoint: the file of weights for a model's name.
        weights: "model" (as trained), "ema" (their average), or "auto" for those whose score is published.
        val_fraction: measure only on the share of `CLASS/*` that a training with the same fraction and seed
            held out; without it all images of such a folder count.
        seed: of the held-out share.
        class_mapping: a file that says which classes the folders or images mean
            (`lightspine.data.load_class_mapping`), or "imagenet" to go by the folders' names. Where it has a
            part of the classes the model chooses among those only, as ImageNet-A and -R are scored.
        image_size: height and width in pixels instead of the checkpoint's own.
        crop_pct: see `find_preprocessing`; the checkpoint's own without it.
        crop_mode: see `find_preprocessing`; the checkpoint's own without it.
        batch_size: images per forward pass.
        num_workers: processes that read images; 0 reads in this one.
        device: torch's name of the device.
        progress: show a bar on the standard error.

    Returns:
        The report, plain values only: `model`, `checkpoint`, `checkpoint_sha256`, `weights` ("ema" or "raw";
        None for a file with one set of weights, which does not say), `parameters`, `data`, `split`,
        `listing_sha256` (of the images' names and classes), `images`;
        `top1` and `top5` in percent (`top5` is None with five classes or fewer), `loss`;
        `classes` (`images`, `top1`, `top5`, `predicted`, `confused_with` of each; None where an image may
        have several right classes, as the loss then is);
        `confusion` (rows: true class, columns: predicted; None above 200 classes);
        `candidates` (how many classes the model chose among); `skipped` (path -> reason); `preprocessing`;
        `loaded` (what became of the file's tensors);
        `throughput` (`images_per_second` with the reading of images, `model_images_per_second` without; both
        leave the first of several batches out); `arguments` of this call; `device`, `threads`; `versions`.

    Raises:
        UsageError: a wrong model, folder, class or value.
        LightspineError: the checkpoint, or every image, cannot be read; the model gives no finite values.
    """
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in locals().items()}
    if batch_size < 1 or num_workers < 0:
        raise UsageError(
            f"expected a batch size of at least 1 and 0 or more workers, got {batch_size} and {num_workers}"
        )
    check_device(device)
    network, saved = load_classifier(model, checkpoint, weights=weights)
    preprocessing = find_preprocessing(saved, image_size=image_size, crop_pct=crop_pct, crop_mode=crop_mode)
    num_classes = int(getattr(network, "num_classes", 0))
    if num_classes < 2:
        raise UsageError(f"expected a checkpoint with a classifier, but {checkpoint or model} has none")
    images = open_eval_dataset(
        data,
        saved,
        preprocessing,
        num_classes,
        val_fraction=val_fraction,
        seed=seed,
        class_mapping=class_mapping,
    )
    loader = DataLoader(images.dataset, batch_size, collate_fn=images.collate, num_workers=num_workers)
    metrics = ClassificationMetrics(
        num_classes, right_classes=images.right_classes, candidates=images.candidates
    )
    batches = progress_bar(loader, "evaluating", shown=progress)
    run = _score(network.to(device), batches, metrics, device)
    if metrics.num_images == 0:
        raise LightspineError(f"none of the images of {data} can be used; {next(iter(run.skipped.values()))}")
    report = getattr(network, "load_report", None)
    return {
        "model": saved.name,
        "checkpoint": str(checkpoint or model),
        "checkpoint_sha256": hash_file(checkpoint or model),
        "weights": _used_weights(report),
        # An exported network has constants in their place.
        "parameters": sum(parameter.numel() for parameter in network.parameters()) or None,
        "data": str(data),
        "split": images.split,
        "listing_sha256": images.listing_sha256,
        "images": metrics.num_images,
        **metrics.compute(),
        "classes": metrics.per_class(images.class_names),
        "confusion": _reported_confusion(metrics),
        "candidates": metrics.num_candidates,
        "skipped": run.skipped,
        "preprocessing": preprocessing.to_dict(),
        "loaded": str(report or ""),
        "throughput": run.throughput(),
        "arguments": arguments,
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "versions": describe_software(),
    }


@dataclass
class _Run:
    """What scoring met on its way, and how long it took; the first of several batches warms up."""

    skipped: dict[str, str] = field(default_factory=dict)
    timed: list[tuple[int, float, float]] = field(default_factory=list)

    def throughput(self) -> dict[str, float]:
        timed = self.timed[1:] or self.timed
        count = sum(images for images, _, _ in timed)
        return {
            "images_per_second": round(count / sum(whole for _, whole, _ in timed), 2),
            "model_images_per_second": round(count / sum(forward for _, _, forward in timed), 2),
        }


def _score(network: nn.Module, batches: Iterable[Batch], metrics: ClassificationMetrics, device: str) -> _Run:
    run = _Run()
    with _evaluating(network), torch.inference_mode():
        started = time.perf_counter()
        for images, labels, bad in batches:
            run.skipped.update((image.path, image.reason) for image in bad)
            if len(images) == 0:
                continue
            arrived = time.perf_counter()
            logits = network(images.to(device))
            synchronize(device)
            forward = time.perf_counter() - arrived
            metrics.update(logits.float().cpu(), labels)
            ended = time.perf_counter()
            run.timed.append((len(images), ended - started, forward))
            started = ended
    return run


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _used_weights(report: Any) -> str | None:
    if report is None or not report.entry:
        return None
    return "ema" if report.is_ema else "raw"


def _reported_confusion(metrics: ClassificationMetrics) -> list[list[int]] | None:
    if metrics.confusion is None or metrics.num_classes > LARGEST_REPORTED:
        return None
    return metrics.confusion.tolist()


@dataclass(frozen=True)
class ClassScore:
    """One class and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first."""

    path: Path
    classes: list[ClassScore]


def predict(
    model: str | Path,
    images: Iterable[str | Path],
    *,
    checkpoint: str | Path | None = None,
    weights: Weights = "auto",
    topk: int = 5,
    image_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    device: str = "cpu",
) -> list[Prediction]:
    """Tell the likeliest classes of image files.

    Args:
        model: a checkpoint file, or the name of a model together with `checkpoint`.
        images: image files.
        checkpoint: the file of weights for a model's name.
        weights: "model" (as trained), "ema" (their average), or "auto" for those whose score is published.
        topk: how many classes to tell; at most all.
        image_size: height and width in pixels instead of the checkpoint's own.
        crop_pct: see `lightspine.evaluation.classifiers.find_preprocessing`.
        crop_mode: likewise.
        device: torch's name of the device.

    Returns:
        One prediction per image, in the order of `images`.

    Raises:
        UsageError: a name without a checkpoint, a missing or too small image, topk below 1.
        LightspineError: an image or the checkpoint cannot be read; the message names it.

    Examples:
        >>> from lightspine.evaluation import predict
        >>> for prediction in predict("runs/digits/model.safetensors", ["seven.png"]):  # doctest: +SKIP
        ...     print(prediction.path, prediction.classes[0].name)
    """
    if topk < 1:
        raise UsageError(f"expected topk of at least 1, got {topk}")
    check_device(device)
    network, saved = load_classifier(model, checkpoint, weights=weights)
    network = network.to(device)
    transform = create_eval_transform(
        find_preprocessing(saved, image_size=image_size, crop_pct=crop_pct, crop_mode=crop_mode)
    )
    names: list[str] | None = None
    predictions = []
    for path in images:
        # One at a time: official models take any number, and a bad file is named before the rest is read.
        pixels = transform(open_image(path)).unsqueeze(0).to(device)
        with torch.inference_mode():
            probabilities = network(pixels)[0].float().softmax(dim=-1)
        names = names or class_names(saved, len(probabilities))
        top = probabilities.topk(min(topk, len(probabilities)))
        scores = [
            ClassScore(names[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        predictions.append(Prediction(Path(path), scores))
    return predictions
