"""Compact storage of many strings, shared by data loader workers without copying."""

from collections.abc import Iterable, Sequence
from typing import Self, overload

import numpy as np


class PackedStrings(Sequence[str]):
    """Immutable sequence of strings stored in two arrays, which forked workers share.

    Reading a Python string changes its reference count, so a forked worker ends up with its own copy of a
    list of strings: about 300 MB per worker for the file names of ImageNet.

    Args:
        data: bytes of `encode_string` of all strings, concatenated; (bytes,), uint8.
        ends: end position of each string in `data`; (strings,), int64.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> Self:
        """Pack strings; every string is returned unchanged."""
        encoded = [encode_string(string) for string in strings]
        ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def from_arrays(cls, data: np.ndarray, ends: np.ndarray) -> Self:
        """Return the strings in two arrays that were read from a file.

        Raises:
            ValueError: the arrays have another type or shape, or hold no strings.
        """
        is_packed = data.dtype == np.uint8 and ends.dtype == np.int64
        if not is_packed or (data.ndim, ends.ndim) != (1, 1):
            raise ValueError("expected bytes and their ends in one dimension")
        bounds = np.concatenate([[0], ends, [len(data)]])
        if (bounds[1:] < bounds[:-1]).any() or bounds[-2] != len(data):
            raise ValueError("expected ends in ascending order, the last at the end of the bytes")
        found = cls(data, ends)
        # Decoding once finds bytes that are not text.
        for _ in found:
            pass
        return found

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one string, or a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = int(self.ends[position - 1]) if position else 0
        return self.data[start : int(self.ends[position])].tobytes().decode("utf-8", "surrogatepass")


def encode_string(string: str) -> bytes:
    """Encode a string as UTF-8, and each surrogate by itself.

    Surrogates stand for the bytes of a file name that the locale cannot decode. Several of them may form a
    valid UTF-8 character, which the error handler "surrogateescape" would return as that character.
    """
    return string.encode("utf-8", "surrogatepass")
