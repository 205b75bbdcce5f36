"""By how much the resident memory of a process rises while a function runs (Linux).

The system's high-water mark is set back just before the call and read just after it. In a process that was
started with `measuring_environment` and has called `start_measuring`, every block from 64 KiB up is mapped
when it is asked for and unmapped when it is freed, so nothing that an earlier call left behind is used again
unseen, and huge pages are off. The system counts pages in lots for each processor, so a difference below
`RESOLUTION_BYTES` means nothing.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from lightspine.errors import LightspineError

RESOLUTION_BYTES = 2**19
_MAPPED_FROM_BYTES = 2**16
_PR_SET_THP_DISABLE = 41


def can_measure_memory() -> bool:
    """Tell whether this system lets a process set its own high-water mark back."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def measuring_environment() -> dict[str, str]:
    """Return the environment to start a measuring process with: the present one, and how it allocates."""
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_MAPPED_FROM_BYTES)}


def start_measuring() -> None:
    """Turn huge pages off in this process and in those that it forks."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def peak_bytes_of(function: Callable[..., object], *arguments: object) -> int:
    """Return by how much the resident memory rose at its highest while the function ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = function(*arguments)
    peak = _status_bytes("VmHWM")
    del result
    return peak - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LightspineError(f"the system does not tell {field} in /proc/self/status")
