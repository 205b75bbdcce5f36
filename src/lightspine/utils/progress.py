"""Progress bar on standard error."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], description: str, *, shown: bool = True) -> Iterable[Item]:
    """Iterate with a progress bar that disappears at the end.

    Args:
        items: what to iterate over; the bar needs its `len()`.
        description: the text beside the bar.
        shown: `False` returns the items as they are, as does a standard error that is no terminal.
    """
    if not (shown and sys.stderr.isatty()):
        return items
    return track(items, description, transient=True, console=Console(file=sys.stderr))
