"""Lock of an output folder, so that two processes do not write the same files."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lightspine.errors import LightspineError

LOCK_FILE = ".lock"
"""Name of the lock file; it is empty and stays in the folder."""

WAIT_SECONDS = 10.0
"""Time for the data loader processes of a killed run to end: they may hold its lock a few seconds longer."""

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create and lock a folder; the operating system releases the lock of a process that dies.

    Raises:
        LightspineError: another process has the lock for more than `WAIT_SECONDS`, or the lock file cannot be
            written.
    """
    file = folder / LOCK_FILE
    lock = FileLock(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Locking empties the file, and the folder may be that of somebody else.
        if file.is_symlink():
            raise LightspineError(
                f"expected a lock file of its own in {folder}, but {file} is a link: remove it"
            )
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("another process is writing to %s: waiting %.0f s for its end", folder, WAIT_SECONDS)
            lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        raise LightspineError(
            f"another process is writing to {folder}: wait until it has ended, or choose another folder"
        ) from None
    except OSError as error:
        raise LightspineError(f"cannot write {file}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
