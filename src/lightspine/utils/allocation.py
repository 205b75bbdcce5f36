"""glibc malloc settings that speed up CPU inference and training."""

import ctypes
import os
import sys

# Parameters of mallopt in glibc's malloc.h, and the the equivalent environment variables.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
ALLOCATOR_VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)
"""Environment variables that configure the allocator; if one is set, `keep_freed_memory` does nothing."""

_MMAP_THRESHOLD = 2**30
_TRIM_THRESHOLD = 2**31 - 1
_TOP_PAD = 2**26

_enabled = False


def keep_freed_memory() -> bool:
    """Make the allocator reuse freed memory instead of returning it to the system.

    By default glibc maps each large block separately (the threshold is at most 32 MiB), and the kernel zeroes
    its pages on first use: a network on a CPU spends 10 to 20 % of its time on that. After this call, blocks
    up to 1 GiB come from the heap, which keeps up to 2 GiB of freed memory. Peak memory stays about the same.
    The command line calls this function at its start; in your own process, call it once before the first
    forward pass.

    Nothing happens without glibc, or if the environment configures the allocator (`GLIBC_TUNABLES`,
    `MALLOC_*_`, `LD_PRELOAD`).

    Returns:
        Whether the process now keeps freed memory.
    """
    global _enabled
    if (
        not _enabled
        and sys.platform == "linux"
        and not any(name in os.environ for name in ALLOCATOR_VARIABLES)
    ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        # mallopt of another C library does not know these parameters and returns 0.
        _enabled = mallopt is not None and all(
            mallopt(parameter, value)
            for parameter, value in (
                (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD),
                (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD),
                (_M_TOP_PAD, _TOP_PAD),
            )
        )
    return _enabled


def keeps_freed_memory() -> bool:
    """Return whether `keep_freed_memory` has taken effect in this process."""
    return _enabled
