"""Output of the commands: lines, aligned tables, or JSON; control characters in them are escaped."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def escape(text: str, *, keep_newlines: bool = False) -> str:
    """Escape control characters as `lightspine.utils.printable` does, without an import if there are none."""
    if text.isprintable():
        return text
    # Imports torch, which takes seconds.
    from lightspine.utils.printable import printable

    return printable(text, keep_newlines=keep_newlines)


def print_text(*lines: str) -> None:
    """Print each argument as one line; without arguments, print an empty line."""
    for line in lines or ("",):
        print(escape(line))


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    from lightspine.utils.printable import printable_json

    print(printable_json(json.dumps(value, indent=2, ensure_ascii=False)))


def warn(message: str | None) -> None:
    """Print a warning to standard error; None prints nothing."""
    if message is not None:
        print(f"lightspine: warning: {escape(message)}", file=sys.stderr)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; a column name that starts with `>` right-aligns the column.

    Tables are never truncated: in a pipe they are as wide as necessary, in a narrow terminal lines wrap.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import measure_renderables
    from rich.table import Table
    from rich.text import Text

    heading = None if title is None else Text(escape(title))
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        table.add_column(Text(escape(column.removeprefix(">"))), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(escape(cell)) for cell in row))
    console = Console(highlight=False, soft_wrap=True)
    needed = measure_renderables(console, console.options.update(width=10_000), [table]).maximum
    Console(highlight=False, width=max(needed, console.width)).print(table)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print `name  value` lines with aligned values."""
    pairs = [(escape(name), escape(value)) for name, value in pairs]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name:<{width}}  {value}".rstrip())


def with_thousands(number: int | None) -> str:
    """Format a number with thousands separators, None as `-`."""
    return "-" if number is None else f"{number:,}"
