"""Log filters of a run: show lightspine's messages, hide irrelevant warnings of other libraries."""

import contextlib
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator

from lightspine.utils.progress import print_line


@contextlib.contextmanager
def filter_lightning_logs() -> Iterator[None]:
    """Hide Lightning's info messages and warnings that users cannot act on."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # In-memory data needs no workers, and the folder of a resumed run is not empty.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
        # Deprecations between Lightning and its own dependencies, torch and jsonargparse.
        warnings.filterwarnings(
            "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
        )
        warnings.filterwarnings("ignore", message=r"\s*By default only one JsonargparseDeprecationWarning")
        warnings.filterwarnings(
            "ignore", message=r"(?s).*deprecated\s+in\s+v4\.", category=DeprecationWarning
        )
        warnings.filterwarnings("ignore", message="(GPU|TPU|MPS) available but not used.*")
        # Every epoch is logged, however short.
        warnings.filterwarnings("ignore", message=".* is smaller than the logging interval")
        # The gradient scaler of 16-mixed precision skips steps until its scale fits, perhaps the first one.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
        # Frozen stages are in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        # The gradient of a 1x1 convolution has other strides than its weights along the axes of length one.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        try:
            yield
        finally:
            logger.setLevel(level)


class _StderrHandler(logging.Handler):
    """Writes to the current `sys.stderr`, which a live progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(record.getMessage())


@contextlib.contextmanager
def show_info_logs() -> Iterator[None]:
    """Show lightspine's info messages, such as the effective batch size, on standard error."""
    logger = logging.getLogger("lightspine")
    # Replaces the command line's handler, which would print messages twice and break a live progress bar.
    level, handlers = logger.level, list(logger.handlers)
    logger.setLevel(min(level, logging.INFO) if level else logging.INFO)
    logger.handlers[:] = [_StderrHandler()]
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)


def has_terminal() -> bool:
    """Return whether standard error is a terminal that is wide enough for a progress bar."""
    return sys.stderr.isatty() and shutil.get_terminal_size().columns > 40
