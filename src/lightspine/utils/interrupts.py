"""SIGINT (Ctrl-C) with child processes: blocked in the children, handled by the main process alone."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Start processes that do not receive SIGINT; this one receives it at the end of the block.

    Otherwise each of them prints a traceback if the signal comes while it is starting.
    """
    if not hasattr(signal, "pthread_sigmask"):
        # On Windows.
        yield
        return
    # Starting this process, which is needed to start others, would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
