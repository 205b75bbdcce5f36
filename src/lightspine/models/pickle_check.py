"""Check of a pickled checkpoint before PyTorch reads it: nesting, shared parts, and sizes in the archive.

PyTorch's restricted unpickler runs no code of a file, but it hashes the keys of dictionaries in C: a tuple
that is nested a million times ends the process, and one whose parts are shared fifty times is never hashed to
the end. The check follows the opcodes without building any object.
"""

import io
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lightspine.errors import LightspineError

_MOST_NESTED = 200
# Bytes that may be read without a look at the length of the file.
_SMALL = 2**20
# Objects of a value, those that it shares counted each time. A state dict has some ten per tensor.
_MOST_OBJECTS = 20_000_000
# Pickles at the start of a file in the format before PyTorch 1.6: magic number, version, system, the content.
_LEGACY_PICKLES = 4

# (nesting, objects) of a value on the stack.
_Value = tuple[int, int]
_MARK: _Value = (-1, 0)
_LEAF: _Value = (0, 1)
_MUTATORS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


def check_pickled_file(path: Path) -> None:
    """Check a file of `torch.save` or a bare pickle; other files pass, for PyTorch to refuse.

    Raises:
        LightspineError: a value is nested or shared too deeply, or the archive claims more than the file has.
    """
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            for content in _archived_pickles(path, file):
                _follow(path, io.BytesIO(content))
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            if not _follow(path, file):
                return


def _archived_pickles(path: Path, file: BinaryIO) -> list[bytes]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # torch.save never compresses.
            if sum(member.file_size for member in members) > size:
                raise LightspineError(
                    f"{path} is refused: its archive claims more bytes than the {size} of the file"
                )
            return [archive.read(member) for member in members if member.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError):
        # PyTorch has its own reader of archives, which says what is wrong.
        return []


class _BoundedReader:
    """Reader of a pickle that refuses a length beyond the end of the file, before memory is allocated."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path = path
        self._file = file
        at = file.tell()
        self._size = file.seek(0, io.SEEK_END)
        file.seek(at)
        self.tell = file.tell
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        left = self._size - self._file.tell()
        # Less is left to PyTorch, which says that the file is incomplete.
        if count > left and count > _SMALL:
            raise LightspineError(
                f"{self._path} is refused: a value in it claims {count} bytes, of which the file has {left}"
            )
        content: bytes = self._file.read(count)
        return content


def _follow(path: Path, file: Any) -> bool:
    """Follow one pickle; return whether it was complete."""
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    try:
        # genops calls read, readline and tell.
        reader = cast(IO[bytes], _BoundedReader(path, file))
        for opcode, argument, _ in pickletools.genops(reader):
            _apply(opcode, argument, stack, memo)
            if stack and (stack[-1][0] > _MOST_NESTED or stack[-1][1] > _MOST_OBJECTS):
                raise LightspineError(
                    f"{path} is refused: it holds a value that is nested more than {_MOST_NESTED} times or "
                    f"has more than {_MOST_OBJECTS:,} parts, which no checkpoint has"
                )
    except (ValueError, IndexError, KeyError):
        # No pickle, or a damaged one.
        return False
    return True


def _apply(opcode: Any, argument: Any, stack: list[_Value], memo: dict[int, _Value]) -> None:
    """Apply an opcode to the stack of sizes, as `pickle` applies it to its stack of objects."""
    name = opcode.name
    if name == "MARK":
        stack.append(_MARK)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[int(argument)] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[int(argument)])
    elif name == "DUP":
        stack.append(stack[-1])
    elif name in ("POP", "POP_MARK"):
        _pop(opcode, stack)
    elif name in _MUTATORS:
        added = _pop(opcode, stack, kept=1)
        stack[-1] = _join([stack[-1], *(_wrap(value) for value in added)])
    else:
        popped = _pop(opcode, stack)
        for _ in opcode.stack_after:
            stack.append(_wrap(_join(popped)) if popped else _LEAF)


def _pop(opcode: Any, stack: list[_Value], kept: int = 0) -> list[_Value]:
    """Pop what an opcode takes, but for the `kept` lowest values."""
    before = [item.name for item in opcode.stack_before]
    if "mark" not in before:
        count = len(before) - kept
        popped = stack[len(stack) - count :] if count else []
        if len(popped) < count:
            raise IndexError
        del stack[len(stack) - count :]
        return popped
    popped = []
    while (value := stack.pop()) != _MARK:
        popped.append(value)
    for _ in range(before.index("mark") - kept):
        popped.append(stack.pop())
    return popped


def _wrap(value: _Value) -> _Value:
    return value[0] + 1, value[1] + 1


def _join(values: list[_Value]) -> _Value:
    return max((value[0] for value in values), default=0), sum(value[1] for value in values)
