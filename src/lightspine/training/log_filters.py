"""What a user of the command line is told: our notes, and not those of the libraries below."""

import contextlib
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def filter_lightning_logs() -> Iterator[None]:
    """Keep Lightning's notes and the warnings that do not concern a user's run to itself."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # In-memory data needs no workers; a resumed run finds its folder full on purpose.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
        # Between Lightning and what it builds on (torch, jsonargparse): a caller cannot change it.
        warnings.filterwarnings(
            "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
        )
        warnings.filterwarnings("ignore", message=r"\s*By default only one JsonargparseDeprecationWarning")
        warnings.filterwarnings(
            "ignore", message=r"(?s).*deprecated\s+in\s+v4\.", category=DeprecationWarning
        )
        warnings.filterwarnings("ignore", message="(GPU|TPU|MPS) available but not used.*")
        # Frozen stages are in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        try:
            yield
        finally:
            logger.setLevel(level)


class _NotesHandler(logging.Handler):
    """Writes to the standard error of the moment, which a live bar replaces by its own."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.getMessage()}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def show_info_logs() -> Iterator[None]:
    """Show what lightspine logs, such as how a batch was made up, on the standard error."""
    logger = logging.getLogger("lightspine")
    # In place of the command line's own handler, which knows no live bar and would say everything twice.
    level, handlers = logger.level, list(logger.handlers)
    logger.setLevel(min(level, logging.INFO) if level else logging.INFO)
    logger.handlers[:] = [_NotesHandler()]
    try:
        yield
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)


def has_terminal() -> bool:
    """Return whether a live bar can be drawn."""
    return sys.stderr.isatty() and shutil.get_terminal_size().columns > 40
