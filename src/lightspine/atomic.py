"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightspine.errors import LightspineError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is complete and on the disk; the folder is made.

    Raises:
        LightspineError: it cannot be written, such as on a full disk; a file of that name stays as it was.
    """
    # With the process in the name: two may write the same file at a time.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        # Where the folder could not be made there is nothing to remove, and asking for it fails.
        with suppress(OSError):
            part.unlink()
        raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str) -> None:
    """Write a text as `whole_file` does."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8", "surrogateescape"))
