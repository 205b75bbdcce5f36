"""Check of a pickled checkpoint before PyTorch reads it: nesting, shared parts, and sizes in the archive.

PyTorch's restricted unpickler runs no code of a file, but it hashes the keys of dictionaries in C: a tuple
that is nested a million times ends the process, one whose parts are shared fifty times is never hashed to the
end, and thousands of keys can be chosen so that all have the same hash. The check follows the opcodes without
building any object.
"""

import io
import pickletools
import struct
import tarfile
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
# Opcodes of a pickle; a tensor has some fifty.
_MOST_OPCODES = 3_000_000
# Keys of dictionaries and sets that are no strings or small integers: their hashes may be chosen to be equal.
_MOST_ODD_KEYS = 1000
# Pickles at the start of a file in the format before PyTorch 1.6: magic number, version, system, the content.
_LEGACY_PICKLES = 4

# (nesting, objects, kind) of a value on the stack. The kind of a class or function is its name.
_Value = tuple[int, int, str]
_KEY, _OTHER = "key", "other"
_MARK: _Value = (-1, 0, _OTHER)
# Strings, and integers of 32 bits.
_KEYS = (
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BININT", "BININT1", "BININT2", "NONE", "NEWTRUE", "NEWFALSE"),
)
# Calls that hash all elements of their argument.
_HASHING = ("builtins set", "__builtin__ set", "collections Counter", "collections OrderedDict")
_MUTATORS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


def check_pickled_file(path: Path) -> None:
    """Check a file of `torch.save` or a bare pickle; other files pass, for PyTorch to refuse.

    Raises:
        LightspineError: a value is nested or shared too deeply, or the archive claims more than the file has.
    """
    with path.open("rb") as file:
        # As PyTorch decides: a pickle may have an archive appended.
        if file.read(4) == b"PK\x03\x04":
            for content in _archived_pickles(path, file):
                _follow(path, io.BytesIO(content))
            return
        file.seek(0)
        if _is_tar(file.read(tarfile.BLOCKSIZE)):
            raise LightspineError(f"{path} is refused: it is a tar archive, expected a file of torch.save")
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            if not _follow(path, file):
                return


def _is_tar(block: bytes) -> bool:
    """Return whether PyTorch would read a file as a tar archive, whose headers may claim any size."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


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
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        struct.error,
    ) as error:
        # PyTorch has its own reader of archives, which may accept what this one does not.
        raise LightspineError(f"{path} is not a complete PyTorch checkpoint: {error}") from error


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
    odd_keys = 0
    try:
        # genops calls read, readline and tell.
        reader = cast(IO[bytes], _BoundedReader(path, file))
        for number, (opcode, argument, _) in enumerate(pickletools.genops(reader)):
            odd_keys += _apply(opcode, argument, stack, memo)
            if stack and (stack[-1][0] > _MOST_NESTED or stack[-1][1] > _MOST_OBJECTS):
                raise LightspineError(
                    f"{path} is refused: it holds a value that is nested more than {_MOST_NESTED} times or "
                    f"has more than {_MOST_OBJECTS:,} parts, which no checkpoint has"
                )
            if number > _MOST_OPCODES or odd_keys > _MOST_ODD_KEYS:
                raise LightspineError(
                    f"{path} is refused: its pickle has more than {_MOST_OPCODES:,} steps or "
                    f"{_MOST_ODD_KEYS:,} keys that are no strings, which no checkpoint has"
                )
    except (ValueError, IndexError, KeyError):
        # No pickle, or a damaged one.
        return False
    return True


def _apply(opcode: Any, argument: Any, stack: list[_Value], memo: dict[int, _Value]) -> int:
    """Apply an opcode to the stack of sizes, as `pickle` applies it to its stack of objects.

    Returns:
        The number of keys that it hashes and that are no strings or small integers.
    """
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
        # In reverse order: value, key, value, key ...
        added = _pop(opcode, stack, kept=1)
        stack[-1] = _join([stack[-1], *(_wrap(value) for value in added)], stack[-1][2])
        hashed = added[1::2] if name in ("SETITEM", "SETITEMS") else added if name == "ADDITEMS" else []
        return sum(value[2] != _KEY for value in hashed)
    else:
        popped = _pop(opcode, stack)
        kind = _KEY if name in _KEYS else argument if name == "GLOBAL" else _OTHER
        for _ in opcode.stack_after:
            stack.append((*_wrap(_join(popped, _OTHER))[:2], kind) if popped else (0, 1, kind))
        if any(value[2] in _HASHING for value in popped):
            # Below the number of a small set.
            return sum(value[1] for value in popped if value[1] > _MOST_ODD_KEYS)
    return 0


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
    while (value := stack.pop()) is not _MARK:
        popped.append(value)
    for _ in range(before.index("mark") - kept):
        popped.append(stack.pop())
    return popped


def _wrap(value: _Value) -> _Value:
    return value[0] + 1, value[1] + 1, value[2]


def _join(values: list[_Value], kind: str) -> _Value:
    return max((value[0] for value in values), default=0), sum(value[1] for value in values), kind
