"""Millions of short texts in two arrays."""

from collections.abc import Iterable, Sequence
from typing import Self, overload

import numpy as np


class PackedTexts(Sequence[str]):
    """A sequence of texts that worker processes share with the process that forked them.

    A list of Python strings is copied page by page into every worker, because reading one changes its
    reference count; ImageNet's paths alone are some 300 MB per worker.

    Args:
        data: the texts in UTF-8, one after the other; (bytes,), uint8.
        ends: where each text ends in `data`; (texts,), int64.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Self:
        """Return the texts as a packed sequence."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one text, or the list of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = int(self.ends[position - 1]) if position else 0
        return self.data[start : int(self.ends[position])].tobytes().decode("utf-8", "surrogateescape")
