"""A bar on the standard error."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track


def with_bar(batches: Sequence[Any] | Any, what: str, *, shown: bool) -> Iterable[Any]:
    """Return batches with a bar that goes when they are done, or as they are."""
    if not shown:
        return batches
    return track(batches, what, transient=True, console=Console(file=sys.stderr))
