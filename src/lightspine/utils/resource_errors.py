"""Errors for lack of memory and for loader workers that died, as one sentence."""

import errno
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data._utils import signal_handling

from lightspine.errors import LightspineError

# Messages of PyTorch's CPU allocator, the C++ library and ONNX Runtime, which raise no dedicated exception.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "insufficient shared memory",
)
_AMOUNT = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class WorkerDiedError(RuntimeError):
    """A loader worker died; see `resource_errors`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory could not be allocated."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(message in str(error).lower() for message in _OUT_OF_MEMORY)
    )


def describe_resource_error(error: BaseException) -> str | None:
    """Return the message of an out-of-memory error or a killed data loader worker, None for other errors."""
    if isinstance(error, WorkerDiedError):
        return str(error)
    if isinstance(error, LightspineError):
        return None
    if isinstance(error, RuntimeError) and (worker := _WORKER.search(str(error))):
        return worker_message(worker[1])
    if not is_out_of_memory(error):
        return None
    amount = _AMOUNT.search(str(error))
    tried = f" to allocate {amount[1]}" if amount else ""
    return f"not enough memory{tried}: a smaller batch, smaller images or fewer loader workers need less"


def worker_message(pids: str) -> str:
    """Return the sentence about loader workers that died, from their process ids."""
    return (
        f"a data loader worker (process {pids}) was killed or crashed, often for lack of memory: fewer "
        "workers (num_workers) or a smaller batch need less"
    )


# Iterators of loaders that may have worker processes.
_ITERATORS: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_workers(batches: Any) -> None:
    """Register the iterator of a torch DataLoader, whose workers are ended when one of them dies."""
    _ITERATORS.add(batches)


def _end_workers() -> None:
    """End the workers of all iterators, without further errors from torch's signal handler."""
    for batches in list(_ITERATORS):
        if getattr(batches, "_worker_pids_set", False):
            # torch removes them after the workers have ended, each of which runs the handler once more.
            signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
            batches._worker_pids_set = False
            batches._shutdown_workers()


@contextmanager
def resource_errors() -> Iterator[None]:
    """Raise a lack of memory and the death of a loader worker as LightspineError; also a decorator.

    PyTorch raises the death of a worker from a signal handler, at any place in the main thread.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        sentence = describe_resource_error(error)
        if sentence is None:
            raise
        _end_workers()
        raise LightspineError(sentence) from error
