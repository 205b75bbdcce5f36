"""Compilation of the CPU kernels, with their machine code cached on disk."""

import functools
import hashlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event as numba_event

_log = logging.getLogger(__name__)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with numba at its first call; the compiled function releases the GIL.

    The machine code is cached beside the package or in the user's cache folder, and compiled again when any
    file of this folder changes. Where neither can be written, as for a user without a home directory in a
    container, a warning is issued and every process compiles the kernels. Each compilation is logged, because
    it takes seconds.
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
    _COMPILATION_LOG.kernels.add(function)
    return compiled


@functools.cache
def _source_digest() -> str:
    """Return a digest of all source files that the kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _CompilationLog(numba_event.Listener):
    """Event listener that logs when numba compiles a kernel, not when it loads one from its disk cache.

    Attributes:
        kernels: functions of the kernels; other functions of a process are not logged.
    """

    def __init__(self) -> None:
        self.kernels: set[Callable[..., Any]] = set()
        self._outer: Any = None

    def on_start(self, event: numba_event.Event) -> None:
        """Log the start of a compilation; one message for a kernel and the kernels inside it."""
        dispatcher = event.data["dispatcher"]
        if self._outer is None and dispatcher.py_func in self.kernels:
            self._outer = dispatcher
            _log.info(
                "compiling the CPU kernel %s, which takes about ten seconds; it is kept on disk",
                dispatcher.py_func.__name__,
            )

    def on_end(self, event: numba_event.Event) -> None:
        """Allow the next message when the outermost compilation ends."""
        if event.data["dispatcher"] is self._outer:
            self._outer = None


# numba holds one lock for all threads while it compiles.
_COMPILATION_LOG = _CompilationLog()
numba_event.register("numba:compile", _COMPILATION_LOG)
