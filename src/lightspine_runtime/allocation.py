"""Keep memory that was freed for the next tensors, in place of handing it back to the system."""

import ctypes
import os
import sys

# glibc's malloc.h, and the environment variables that set the same.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)
_LARGEST_BLOCK = 2**30
_LARGEST_REST = 2**31 - 1
_GROWTH = 2**26

_kept = False


def keep_freed_memory() -> bool:
    """Let this process use memory again that its tensors have freed; return whether it does.

    glibc maps each block above some size, 32 MiB at most, for itself, and the system clears each of its
    pages: a network on a CPU spends a tenth to a fifth of its time on that. Blocks up to 1 GiB are taken
    from one heap afterwards, up to 2 GiB of which stay with the process when they are free. The most that a
    process holds stays about the same; it gives less back in between. The programs of the command line do
    this when they start; in a process of your own, call it once, before the first network.

    Nothing happens without glibc, or where the environment says how to allocate (`GLIBC_TUNABLES`,
    `MALLOC_*_`, `LD_PRELOAD`).
    """
    global _kept
    if not _kept and sys.platform == "linux" and not any(name in os.environ for name in _VARIABLES):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        # Another C library's knows other numbers, and answers 0.
        _kept = mallopt is not None and all(
            mallopt(parameter, value)
            for parameter, value in (
                (_M_MMAP_THRESHOLD, _LARGEST_BLOCK),
                (_M_TRIM_THRESHOLD, _LARGEST_REST),
                (_M_TOP_PAD, _GROWTH),
            )
        )
    return _kept


def keeps_freed_memory() -> bool:
    """Return whether `keep_freed_memory` has taken effect in this process."""
    return _kept
