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
        items: the iterable; its `len()` is the total.
        description: the text before the bar.
        shown: `False` disables the bar, which is also disabled if standard error is not a terminal.
    """
    if not (shown and sys.stderr.isatty()):
        return items
    return track(items, description, transient=True, console=Console(file=sys.stderr))
