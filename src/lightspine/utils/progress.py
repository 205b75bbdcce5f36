"""Progress on standard error: a bar in a terminal, otherwise a line every 30 seconds."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn, track

from lightspine.utils.printable import printable

Item = TypeVar("Item")

LINE_SECONDS = 30.0
"""Time between two lines of progress in a log file."""


def progress_bar(
    items: Iterable[Item], description: str, *, shown: bool = True, every_seconds: float = LINE_SECONDS
) -> Iterable[Item]:
    """Iterate with a progress bar that disappears at the end, or with lines if there is no terminal.

    Args:
        items: the iterable; its `len()` is the total.
        description: the text before the bar or at the start of a line.
        shown: `False` shows nothing.
        every_seconds: time between two lines.
    """
    if not shown:
        return items
    if not sys.stderr.isatty():
        return _with_lines(items, description, every_seconds)
    return track(items, bar_text(description), transient=True, console=Console(file=sys.stderr))


def byte_progress(
    blocks: Iterable[bytes], description: str, total: int | None, completed: int = 0
) -> Iterator[bytes]:
    """Iterate over blocks of bytes with a bar that shows amount and rate, or with lines.

    Args:
        blocks: the blocks.
        description: the text before the bar.
        total: bytes of all blocks, `None` if not known.
        completed: bytes that were there before.
    """
    shown, timer = sys.stderr.isatty(), LineTimer()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not shown) as progress:
        task = progress.add_task(bar_text(description), total=total, completed=completed)
        for block in blocks:
            yield block
            completed += len(block)
            progress.update(task, completed=completed)
            if not shown and timer.is_due():
                of = "" if total is None else f" of {total / 2**20:.0f}"
                print_line(f"{description}: {completed / 2**20:.0f}{of} MiB")


class LineTimer:
    """Limits lines of progress to one every few seconds.

    Args:
        every_seconds: time between two lines.
    """

    def __init__(self, every_seconds: float = LINE_SECONDS) -> None:
        self.every_seconds = every_seconds
        self.restart()

    def restart(self) -> None:
        """Let the full time pass before the next line."""
        self._last = time.perf_counter()

    def is_due(self) -> bool:
        """Return whether it is time for a line; if so, the time starts again."""
        if time.perf_counter() - self._last < self.every_seconds:
            return False
        self.restart()
        return True


def print_line(line: str) -> None:
    """Print a line to standard error at once, also if it is a file; control characters are escaped."""
    sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.flush()


def bar_text(text: str) -> str:
    """Return the text beside a progress bar of rich: no control characters, no brackets as markup."""
    return escape(printable(text))


def format_seconds(seconds: float) -> str:
    """Return a duration as "1:23" or "2:01:23"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _with_lines(items: Iterable[Item], description: str, every_seconds: float) -> Iterator[Item]:
    total = len(items) if isinstance(items, Sized) else None
    started, timer = time.perf_counter(), LineTimer(every_seconds)
    for done, item in enumerate(items):
        if done and timer.is_due():
            passed = time.perf_counter() - started
            left = "" if total is None else f", {format_seconds((total - done) * passed / done)} left"
            print_line(f"{description}: {done}{'' if total is None else f'/{total}'}{left}")
        yield item
