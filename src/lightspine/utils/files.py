"""Atomic file writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightspine.errors import LightspineError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to `path` once it is complete and on disk; creates the folder.

    Raises:
        LightspineError: the file cannot be written, for example on a full disk. An existing file stays as it was.
    """
    # The process id keeps two processes that write the same file apart.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        # Without the folder, unlink raises as well.
        with suppress(OSError):
            part.unlink()
        raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, content: str) -> None:
    """Write text to a file atomically."""
    with atomic_write(path) as file:
        file.write(content.encode("utf-8", "surrogateescape"))
