"""How commands print: aligned tables for people, JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print rows under their columns; a column whose name starts with `>` is aligned to the right.

    A table is never cut: in a pipe it takes the width it needs, in a narrow terminal its lines wrap.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import measure_renderables
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        table.add_column(Text(column.removeprefix(">")), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False, soft_wrap=True)
    needed = measure_renderables(console, console.options.update(width=10_000), [table]).maximum
    Console(highlight=False, width=max(needed, console.width)).print(table)


def print_pairs(facts: Iterable[tuple[str, str]]) -> None:
    """Print `name  value` lines with the values aligned."""
    facts = list(facts)
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        print(f"{name:<{width}}  {value}".rstrip())


def with_thousands(number: int | None) -> str:
    """Return 30,249,064 for 30249064 and `-` for nothing."""
    return "-" if number is None else f"{number:,}"
