"""Peak resident memory (RSS) of a function call on Linux, from the kernel's high-water mark.

The high-water mark is reset right before the call and read right after it. The process must be started with
`measuring_environment()` and call `disable_huge_pages()`: then malloc maps every block of 64 KiB or more and
unmaps it when it is freed, so no call reuses freed memory of an earlier one. The kernel counts pages
in batches per processor, so differences below `RESOLUTION_BYTES` are noise.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from lightspine.errors import LightspineError

RESOLUTION_BYTES = 2**19
_MMAP_THRESHOLD_BYTES = 2**16
_PR_SET_THP_DISABLE = 41


def can_measure_memory() -> bool:
    """Return whether a process can reset its own high-water mark, as on Linux."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def measuring_environment() -> dict[str, str]:
    """Return the environment for a measuring process: the current one, with a low mmap threshold."""
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD_BYTES)}


def disable_huge_pages() -> None:
    """Disable transparent huge pages in this process and its forks."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def peak_rss_bytes(function: Callable[..., object], *arguments: object) -> int:
    """Return the peak resident memory during a call, minus the resident memory before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _read_status_bytes("VmRSS")
    result = function(*arguments)
    peak = _read_status_bytes("VmHWM")
    del result
    return peak - before


def _read_status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LightspineError(f"expected the field {field} in /proc/self/status, it is missing")
