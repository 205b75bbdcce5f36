"""What went wrong with a row, in one sentence, and whether it was memory."""

import torch

from lightspine.benchmark.results import Status

# What PyTorch's CPU allocator, the C++ library and ONNX Runtime say; they raise no type of their own.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
)
_LONGEST = 300


def describe_failure(error: BaseException) -> tuple[Status, str]:
    """Return the status of a row whose measurement raised, and why."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _speaks_of_memory(text):
        return "out_of_memory", _shortened(text) or "the process could get no more memory"
    return "failed", _shortened(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _speaks_of_memory(text: str) -> bool:
    return any(phrase in text.lower() for phrase in _OUT_OF_MEMORY)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
