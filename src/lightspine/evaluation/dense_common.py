"""Checks, timing and batching shared by detector and segmenter evaluation."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightspine.errors import LightspineError, UsageError
from lightspine.utils.devices import peak_memory_mib, synchronize


def check_loading(batch_size: int, num_workers: int) -> None:
    """Refuse what no loader can do.

    Raises:
        UsageError: a batch size below 1, or fewer than 0 workers.
    """
    if batch_size < 1 or num_workers < 0:
        raise UsageError(
            f"expected a batch size of at least 1 and 0 or more workers, got {batch_size} and {num_workers}"
        )


def check_detection_options(options: dict[str, Any]) -> None:
    """Refuse options with which a detector finds nothing or fails.

    Args:
        options: those that take the place of the checkpoint's.

    Raises:
        UsageError: a score outside 0 to 1, fewer than 1 detection, sides below 1 or the longer first.
    """
    score, most = options.get("score_threshold", 0.0), options.get("detections_per_image", 1)
    shorter, longest = options.get("resize", (1, 1))
    if not 0 <= score <= 1:
        raise UsageError(f"expected a score_threshold from 0 to 1, got {score}")
    if most < 1:
        raise UsageError(f"expected detections_per_image of at least 1, got {most}")
    if not 1 <= shorter <= longest:
        raise UsageError(
            f"expected a resize of at least 1 px, the shorter side first, got {shorter} and {longest}"
        )


def check_finite(network: nn.Module, checkpoint: str | Path) -> None:
    """Refuse the weights of a diverged training, which would score a little instead of failing.

    Raises:
        LightspineError: a weight that is not finite.
    """
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise LightspineError(f"{checkpoint} holds weights that are not finite, the first in {name}")


class FiniteLogits:
    """A segmenter whose logits are finite: the largest of numbers that are none is some class all the same.

    Args:
        network: the segmenter.
        checkpoint: what an error calls it.
    """

    def __init__(self, network: Any, checkpoint: str | Path) -> None:
        self.network = network
        self.checkpoint = checkpoint

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes, H, W) of images (B, 3, H, W).

        Raises:
            LightspineError: one is not finite.
        """
        logits: Tensor = self.network(images)
        # One pass without a copy: a sum is finite where all of these are.
        if not logits.sum(dtype=torch.float32).isfinite():
            raise LightspineError(f"the segmenter in {self.checkpoint} gives logits that are not finite")
        return logits


def sort_by_size(sizes: np.ndarray) -> list[int]:
    """Return the positions of images such that equal sizes follow each other, the largest first.

    An image that does not fit into the memory is met at the start.

    Args:
        sizes: (images, 2), height and width.
    """
    keys = (sizes[:, 1], sizes[:, 0], sizes.prod(axis=1))
    order: list[int] = np.lexsort(keys)[::-1].tolist()
    return order


def detect_by_size(detector: Any, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return what a detector finds, images of one size at a time.

    A detector fills the smaller images of a batch up with zeros, which changes what it finds in them.

    Args:
        detector: in evaluation mode.
        images: each (3, H, W), 0..1.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(position)
    found: dict[int, dict[str, Tensor]] = {}
    for positions in groups.values():
        results = detector([images[position] for position in positions])
        found |= dict(zip(positions, results, strict=True))
    return [found[position] for position in range(len(images))]


class ThroughputTimer:
    """Adds up the seconds that are spent reading, in the network and behind it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.images = 0
        self.seconds = {"reading": 0.0, "network": 0.0, "scoring": 0.0}

    def reading(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches and take the time until each of them is there."""
        iterator = iter(batches)
        while True:
            with self.taking("reading"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def taking(self, part: str) -> Iterator[None]:
        """Take the time of a part."""
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[part] += time.perf_counter() - started

    def report(self) -> dict[str, Any]:
        """Return images per second, seconds by part and the most memory in MiB."""
        total = sum(self.seconds.values())
        return {
            "images_per_second": round(self.images / total, 3) if total else None,
            "seconds": {part: round(seconds, 2) for part, seconds in self.seconds.items()},
            "reading_share": round(self.seconds["reading"] / total, 4) if total else None,
            "peak_mib": peak_memory_mib(torch.device(self.device)),
        }
