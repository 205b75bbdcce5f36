"""How the time of an evaluation is spent."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightspine.utils.devices import peak_memory_mib, synchronize


class Stopwatch:
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
