"""Helpers of the evaluators: option checks, NaN checks, timing and environment information."""

import hashlib
import logging
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightspine._version import __version__
from lightspine.data.split_record import Part, SplitRecord
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.devices import peak_memory_mib, synchronize

_log = logging.getLogger(__name__)

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "pillow", "faster-coco-eval")


def check_loader_options(batch_size: int, num_workers: int) -> None:
    """Check the options of a data loader.

    Raises:
        UsageError: a batch size below 1, or a negative number of workers.
    """
    if batch_size < 1 or num_workers < 0:
        raise UsageError(
            f"expected a batch size of at least 1 and 0 or more workers, got {batch_size} and {num_workers}"
        )


def check_finite_weights(network: nn.Module, label: str) -> None:
    """Check that all weights are finite; a diverged model would otherwise just get a low score.

    Args:
        network: the network.
        label: name of the checkpoint in the error message.

    Raises:
        LightspineError: a weight is not finite.
    """
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise LightspineError(f"{label} holds weights that are not finite, the first in {name}")


def find_part(run: dict[str, Any], images: Sequence[str]) -> tuple[Part | None, SplitRecord | None]:
    """Return which images of its training run a model is evaluated on, and the record of the run's split.

    Args:
        run: `ModelMetadata.run` of the checkpoint.
        images: paths of the images.
    """
    known = run.get("data")
    if known is None:
        return None, None
    record = SplitRecord.from_dict(known)
    return record.find_part(images), record


def describe_split(part: Part | None, default: str) -> str:
    """Return the description of the evaluated images for the report, and warn about training images.

    Args:
        part: which images of the training run they are, from `find_part`.
        default: description of the images without the training run.
    """
    if part == "val":
        return f"{default}: the validation images of the training"
    if part == "train":
        _log.warning("these are the images that the model was trained on: the scores are too high")
        return f"{default}: the training images"
    if part in ("all", "changed"):
        _log.warning("images that the model was trained on are among these: the scores are too high")
        return f"{default}, training images included"
    return default


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How data without splits is split for an evaluation.

    Attributes:
        fraction: share of the images that is held out.
        seed: seed of the split.
        requested: whether the user asked for this fraction; otherwise it is that of the training, if known.
    """

    fraction: float
    seed: int
    requested: bool

    def choose(self, run: dict[str, Any], images: Sequence[str]) -> tuple[bool, str]:
        """Return whether to evaluate the held-out images only, and the description of the evaluated images.

        Args:
            run: `ModelMetadata.run` of the checkpoint.
            images: paths of all images.
        """
        described = f"{self.fraction:g} held out {{}}with seed {self.seed}"
        part, record = find_part(run, images)
        same = record is not None and (record.val_fraction, record.seed) == (self.fraction, self.seed)
        if part == "all" and same:
            return True, described.format("by the training ")
        if self.requested:
            return True, describe_split(part, described.format(""))
        return False, describe_split(part, "all images")


def find_held_out(run: dict[str, Any], val_fraction: float | None, seed: int | None) -> HeldOut:
    """Return how to split data without splits: as requested, or as the training did.

    Args:
        run: `ModelMetadata.run` of the checkpoint.
        val_fraction: requested share of the images.
        seed: requested seed; default: that of the training, or 0.
    """
    known = run.get("data") or {}
    trained_seed = known.get("seed") or 0
    if val_fraction is None:
        # Without a known run all images are evaluated, so that this fraction has no effect.
        return HeldOut(fraction=known.get("val_fraction") or 0.2, seed=trained_seed, requested=False)
    return HeldOut(fraction=val_fraction, seed=trained_seed if seed is None else seed, requested=True)


class FiniteLogits:
    """Wrap a segmenter to reject non-finite logits, because argmax of NaN still returns a class.

    Args:
        network: the segmenter.
        label: name of the checkpoint in the error message.
    """

    def __init__(self, network: Any, label: str) -> None:
        self.network = network
        self.label = label

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes, H, W) of images (B, 3, H, W).

        Raises:
            LightspineError: a logit is not finite.
        """
        logits: Tensor = self.network(images)
        # The sum is finite only if all logits are, and takes less memory than `isfinite` of them.
        if not logits.sum(dtype=torch.float32).isfinite():
            raise LightspineError(f"the segmenter in {self.label} gives logits that are not finite")
        return logits


class ThroughputTimer:
    """Throughput and time for data loading, the network and the metrics."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.images = 0
        self.seconds = {"reading": 0.0, "network": 0.0, "scoring": 0.0}

    def time_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches and measure the time to load each of them."""
        iterator = iter(batches)
        while True:
            with self.measure("reading"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the duration of a `with` block to a part."""
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[part] += time.perf_counter() - started

    def report(self) -> dict[str, Any]:
        """Return images per second, seconds per part and peak memory in MiB."""
        total = sum(self.seconds.values())
        return {
            "images_per_second": round(self.images / total, 3) if total else None,
            "seconds": {part: round(seconds, 2) for part, seconds in self.seconds.items()},
            "reading_share": round(self.seconds["reading"] / total, 4) if total else None,
            "peak_mib": peak_memory_mib(torch.device(self.device)),
        }


def describe_weights(network: nn.Module) -> str | None:
    """Return "ema" or "raw", or `None` for a file with a single set of weights."""
    report = getattr(network, "load_report", None)
    return None if report is None or not report.entry else "ema" if report.is_ema else "raw"


def describe_environment(device: str) -> dict[str, Any]:
    """Return the device with GPU name, the number of CPU threads and the package versions."""
    kind = torch.device(device)
    versions = {"lightspine": __version__, "python": platform.python_version()}
    return {
        "device": f"{device} ({torch.cuda.get_device_name(kind)})" if kind.type == "cuda" else device,
        "threads": torch.get_num_threads(),
        "versions": versions | {name: version(name) for name in _PACKAGES},
    }


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_names(names: Iterable[str]) -> str:
    """Return the SHA-256 of names, one per line, as hexadecimal digits."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
