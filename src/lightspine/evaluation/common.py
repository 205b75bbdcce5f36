"""Helpers of the evaluators: option checks, NaN checks, timing and environment information."""

import hashlib
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightspine._version import __version__
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.devices import peak_memory_mib, synchronize

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
