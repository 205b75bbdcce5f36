"""A checkpoint and a folder of images in, a report out."""

import json
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightspine._version import __version__
from lightspine.data.digits import CLASS_NAMES, DigitsDataset
from lightspine.data.image_folder import (
    VAL_NAMES,
    Batch,
    ImageFolderDataset,
    Sample,
    collate_images,
    list_images,
    scan_image_folder,
)
from lightspine.data.transforms import Preprocessing, create_eval_transform
from lightspine.errors import LightspineError, UsageError
from lightspine.evaluation.predict import load_network
from lightspine.models._saving import SavedModel

DIGITS = "digits"
_LARGEST_CONFUSION = 200


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    checkpoint: str | Path | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Measure how often a checkpoint is right.

    Args:
        model: a checkpoint file, or the name of a model together with `checkpoint`.
        data: "digits" for the held-out digits, or a folder `val/CLASS/*` or `CLASS/*`. The folders' names are
            matched with the class names of the checkpoint, so a folder with some of its classes will do.
        checkpoint: the file of weights for a model's name.
        val_fraction: measure only on the share of `CLASS/*` that a training with the same fraction and seed
            held out; without it all images of such a folder count.
        seed: of the held-out share.
        image_size: height and width in pixels instead of the checkpoint's own.
        batch_size: images per forward pass.
        num_workers: processes that read images; 0 reads in this one.
        device: torch's name of the device.
        progress: show a bar.

    Returns:
        The report, plain values only: `model`, `checkpoint`, `parameters`, `data`, `split`, `images`;
        `top1` and `top5` in percent (`top5` is None with five classes or fewer), `loss`;
        `classes` (`images` and `top1` of each);
        `confusion` (rows: true class, columns: predicted; None above 200 classes);
        `skipped` (path -> reason); `preprocessing`; `loaded` (what became of the file's tensors);
        `device`; `versions`.

    Raises:
        UsageError: a wrong model, folder or class.
        LightspineError: the checkpoint, or every image, cannot be read.
    """
    network, saved = load_network(model, checkpoint)
    preprocessing = Preprocessing.from_config(saved.preprocessing, image_size=image_size)
    num_classes = int(getattr(network, "num_classes", 0))
    if num_classes < 2:
        raise UsageError(f"expected a checkpoint with a classifier, but {checkpoint or model} has none")
    source = _open_data(data, saved, preprocessing, num_classes, val_fraction, seed)
    loader = DataLoader(source.dataset, batch_size, collate_fn=source.collate, num_workers=num_workers)
    batches: Iterable[Batch] = track(loader, "evaluating", transient=True) if progress else loader
    tally = _count(network.to(device), batches, num_classes, device)
    images = int(tally.confusion.sum())
    if images == 0:
        raise LightspineError(
            f"none of the images of {data} can be used; {next(iter(tally.skipped.values()))}"
        )
    return {
        "model": saved.name,
        "checkpoint": str(checkpoint or model),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "data": str(data),
        "split": source.split,
        "images": images,
        "top1": 100 * int(tally.confusion.trace()) / images,
        "top5": 100 * tally.in_top5 / images if num_classes > 5 else None,
        "loss": tally.loss / images,
        "classes": _per_class(source.class_names, tally.confusion),
        "confusion": tally.confusion.tolist() if num_classes <= _LARGEST_CONFUSION else None,
        "skipped": tally.skipped,
        "preprocessing": preprocessing.to_dict(),
        "loaded": str(getattr(network, "load_report", "")),
        "device": device,
        "versions": {
            "lightspine": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def write_report(report: dict[str, Any], path: str | Path) -> Path:
    """Write a report as JSON; the folder is made.

    Raises:
        LightspineError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error
    return path


@dataclass
class _Source:
    dataset: Dataset
    class_names: list[str]
    split: str
    collate: Any = collate_images


@dataclass
class _Tally:
    confusion: Tensor
    in_top5: int = 0
    loss: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)


def _open_data(
    data: str | Path,
    saved: SavedModel,
    preprocessing: Preprocessing,
    num_classes: int,
    val_fraction: float | None,
    seed: int,
) -> _Source:
    if str(data) == DIGITS:
        _check_count(len(CLASS_NAMES), num_classes, "the digits")
        size = preprocessing.input_size[1]
        return _Source(DigitsDataset("test", image_size=size), CLASS_NAMES, "test", collate=_as_is)
    root = Path(data)
    names, samples, split = _find_samples(root, saved.class_names, val_fraction, seed)
    _check_count(len(names), num_classes, str(root))
    return _Source(ImageFolderDataset(samples, create_eval_transform(preprocessing)), names, split)


def _find_samples(
    root: Path, class_names: list[str] | None, val_fraction: float | None, seed: int
) -> tuple[list[str], list[Sample], str]:
    val_root = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    if val_fraction is None:
        names, samples = list_images(val_root or root, class_names)
        return names, samples, val_root.name if val_root else "all images"
    if val_root is not None:
        raise UsageError(f"expected no val_fraction for {root}, which has a folder {val_root.name}")
    splits = scan_image_folder(root, val_fraction=val_fraction, seed=seed)
    names = class_names or splits.class_names
    if unknown := sorted(set(splits.class_names) - set(names)):
        raise UsageError(f"class {unknown[0]} of {root} is not among the model's {len(names)} classes")
    samples = [Sample(path, names.index(splits.class_names[label])) for path, label in splits.val]
    return names, samples, f"{val_fraction:g} held out with seed {seed}"


def _count(network: nn.Module, batches: Iterable[Batch], num_classes: int, device: str) -> _Tally:
    """Run every batch and count true against predicted classes."""
    tally = _Tally(torch.zeros(num_classes, num_classes, dtype=torch.int64))
    with _evaluating(network), torch.inference_mode():
        for images, labels, bad in batches:
            tally.skipped.update((image.path, image.reason) for image in bad)
            if len(images) == 0:
                continue
            logits = network(images.to(device)).float().cpu()
            top = logits.topk(min(5, num_classes)).indices
            tally.in_top5 += int((top == labels[:, None]).any(dim=1).sum())
            tally.loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            cells = labels * num_classes + top[:, 0]
            tally.confusion += torch.bincount(cells, minlength=num_classes**2).view_as(tally.confusion)
    return tally


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _per_class(names: list[str], confusion: Tensor) -> dict[str, dict[str, float | None]]:
    counts, hits = confusion.sum(dim=1).tolist(), confusion.diag().tolist()
    return {
        name: {"images": count, "top1": 100 * hit / count if count else None}
        for name, count, hit in zip(names, counts, hits, strict=True)
    }


def _check_count(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise UsageError(f"expected {expected} classes, as many as the checkpoint's, but {where} has {found}")


def _as_is(batch: Any) -> Any:
    return batch
