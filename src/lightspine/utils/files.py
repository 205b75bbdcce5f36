"""Atomic file writes; names and JSON documents that come with the files of others."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lightspine.errors import LightspineError, UsageError

# Longest file name of the usual file systems, in bytes.
_LONGEST_NAME = 255


def is_file_name(name: str) -> bool:
    """Return whether a string is a plain file name: no separators, no `..`, not too long."""
    return (
        name not in ("", ".", "..")
        and not any(character in "/\\" or ord(character) < 32 for character in name)
        and len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME
    )


def is_text(text: str) -> bool:
    """Return whether a string can be written as UTF-8; surrogates may stand for the bytes of a file name."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document, as `json.loads` does.

    Raises:
        ValueError: the text is not JSON, not UTF-8, or nested more deeply than Python's stack allows.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that is renamed to `path` once it is complete and on disk; creates the folder.

    Several processes, also on different machines, may write the same file: the last one wins.

    Raises:
        LightspineError: the file cannot be written, for example on a full disk; an existing file is kept.
    """
    # A random name, because process ids repeat on machines that share a file system.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder that replaces `path` on success; creates the parent folder.

    The temporary folder has the same name as `path` and does not exist yet. A link is replaced, not the
    folder that it leads to.

    Raises:
        LightspineError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as parent:
        part = Path(parent) / path.name
        yield part
        try:
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
        except OSError as error:
            raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error


def path_from_text(name: str) -> str:
    """Return a file name as Python's file functions expect it, given as text from a UTF-8 file.

    They differ under a locale that is not UTF-8, where names on disk that are UTF-8 are decoded otherwise.

    Raises:
        UnicodeEncodeError: the text holds a surrogate.
    """
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def text_from_path(path: str | Path) -> str:
    """Return a path as text for a UTF-8 file; the inverse of `path_from_text`."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def check_writable(path: Path) -> None:
    """Check that a file can be written, before expensive work; creates the folder.

    Raises:
        UsageError: the path is a folder.
        LightspineError: the folder cannot be created or written to.
    """
    if path.is_dir():
        raise UsageError(f"expected a file to write, got the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LightspineError(f"cannot write {path}: {error.strerror or error}") from error
