"""How a run that fails or is interrupted says where its last checkpoint is."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from lightspine.errors import LightspineError, UsageError


class TrainingInterruptedError(LightspineError):
    """Ctrl-C during training; the sentence says where the last checkpoint is."""

    exit_status = 130


@contextlib.contextmanager
def naming_last_checkpoint(last: Path) -> Iterator[None]:
    """Say where the last checkpoint is when a run fails or is interrupted.

    Args:
        last: where it is if there is one.

    Raises:
        TrainingInterruptedError: in place of the exception of Ctrl-C.
        LightspineError: the same sentence with the checkpoint behind it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    # Lightning ends the process at Ctrl-C instead of passing it on.
    except (KeyboardInterrupt, SystemExit) as error:
        resume = f"; go on with --resume {last}" if last.is_file() else ""
        raise TrainingInterruptedError(f"training was interrupted; {_describe(last)}{resume}") from error
    except UsageError:
        raise
    except LightspineError as error:
        raise LightspineError(f"{error}; {_describe(last)}") from error
    finally:
        # Lightning leaves Ctrl-C switched off for the rest of the process.
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def _describe(last: Path) -> str:
    if not last.is_file():
        return "no epoch was finished, so there is no checkpoint"
    return f"the last checkpoint is {last}"
