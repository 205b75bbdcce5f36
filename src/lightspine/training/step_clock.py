"""What the steps of an epoch cost: how long they wait for their images, and the most memory they take."""

import sys
import time

import torch


class StepClock:
    """Adds up the time between steps, when a batch is awaited, and the time of the steps themselves."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._worked = 0.0
        self._since: float | None = None

    def batch_came(self) -> None:
        """Tell that a batch is there; before the first one the workers start, which is not counted."""
        now = time.perf_counter()
        if self._since is not None:
            self._waited += now - self._since
        self._since = now

    def batch_done(self) -> None:
        """Tell that a step is done and the next batch is wanted."""
        now = time.perf_counter()
        if self._since is not None:
            self._worked += now - self._since
        self._since = now

    def pause(self) -> None:
        """Leave out the time up to the next batch."""
        self._since = None

    def share(self) -> float:
        """Return the waiting as a share of the whole, 0 to 1; 0 before the second batch."""
        total = self._waited + self._worked
        return self._waited / total if total else 0.0


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the most memory in MiB so far: on a GPU of torch's allocator, else of this process.

    None on Windows, which does not tell it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
