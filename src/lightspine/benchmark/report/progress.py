"""A bar on the standard error."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_Item = TypeVar("_Item")


def with_bar(items: Sequence[_Item], what: str, *, shown: bool) -> Iterable[_Item]:
    """Return the items with a bar that goes when they are done, or as they are; only a terminal has bars."""
    if not (shown and sys.stderr.isatty()):
        return items
    return track(items, what, transient=True, console=Console(file=sys.stderr))
