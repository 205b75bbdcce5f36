"""Compile a kernel once per machine, or, where nothing can be written, once per process."""

import warnings
from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call; the compiled one releases the interpreter's lock.

    The code is kept beside the package or in the user's cache folder. Where neither can be written, as for a
    user without a home in a container, a warning says so and every process compiles for itself.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        warnings.warn(
            "the compiled CPU scan cannot be kept on disk, so each process compiles it for some seconds: "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=1,  # one place for all kernels, so that it is said once
        )
        return njit(**options)(function)
