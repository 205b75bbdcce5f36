"""Devices: availability, synchronization, thread count and peak memory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightspine.errors import UsageError


def check_device(device: str) -> None:
    """Check that a device is available.

    Raises:
        UsageError: this machine has no such device.
    """
    try:
        # Allocating works the same for every device type; the is_available functions do not.
        torch.empty(0, device=device)
    # torch raises AssertionError where it was built without support for the device.
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error


def synchronize(device: str | torch.device) -> None:
    """Wait until all work queued on a device is done; returns at once for a CPU."""
    device_type = torch.device(device).type
    if device_type == "cuda":
        torch.cuda.synchronize(device)
    elif device_type == "mps":
        torch.mps.synchronize()


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set PyTorch's number of intra-op threads within a block; `None` leaves it unchanged."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory so far in MiB: PyTorch's allocations on a GPU, otherwise the process's RSS.

    `None` on Windows, which does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux
