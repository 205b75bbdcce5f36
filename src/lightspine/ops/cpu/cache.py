"""Compilation of the CPU kernels, with their machine code cached on disk."""

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with numba at its first call; the compiled function releases the GIL.

    The machine code is cached beside the package or in the user's cache folder, and compiled again when any
    file of this folder changes. Where neither can be written, as for a user without a home directory in a
    container, a warning is issued and every process compiles the kernels.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Any = njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        warnings.warn(
            "the compiled CPU scan cannot be cached on disk, so each process compiles it for some seconds: "
            "set NUMBA_CACHE_DIR to a writable folder",
            RuntimeWarning,
            stacklevel=1,  # one place for all kernels, so that the warning appears once
        )
        return njit(**options)(function)
    # numba discards cached code whose stamp differs. Its own stamp, date and size of the file of the kernel,
    # does not notice a change in the functions that the kernel calls.
    compiled._cache._cache_file._source_stamp = _source_digest()
    return compiled


@functools.cache
def _source_digest() -> str:
    """Return a digest of all source files that the kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
