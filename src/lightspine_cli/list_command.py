"""List the models of lightspine with their published results. Models of timm are not listed."""

import argparse
from typing import Any

from lightspine_cli._output import print_json, print_table, print_text, with_thousands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine list`."""
    parser.add_argument("pattern", nargs="?", default="*", help="name or shell pattern, such as 'vmamba*'")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the models as a table or as JSON.

    Raises:
        UsageError: no model matches.
    """
    from lightspine.errors import UsageError
    from lightspine.models import get_record, list_models

    pattern = args.pattern if any(mark in args.pattern for mark in "*?[") else f"*{args.pattern}*"
    records = [get_record(name) for name in list_models(pattern)]
    if not records:
        raise UsageError(
            f"no model matches {args.pattern!r}; expected a pattern such as 'vim*', one of {_families()}"
        )
    if args.json:
        print_json([_as_object(record) for record in records])
        return 0

    notes: list[str] = []
    rows = [_row(record, notes) for record in records]
    print_table(("model", "family", ">parameters", ">GMACs", ">pixels", ">top-1 %", ""), rows)
    print_text()
    for mark, note in enumerate(notes, start=1):
        print_text(f"({mark}) {note}")
    print_text("GMACs and top-1 are as published (ImageNet-1k); `lightspine info NAME` counts the MACs.")
    return 0


def _families() -> str:
    from lightspine.models import get_record, list_models

    return ", ".join(dict.fromkeys(get_record(name).family for name in list_models()))


def _as_object(record: Any) -> dict[str, Any]:
    published = record.published
    return {
        "name": record.name,
        "family": record.family,
        "params": record.params,
        "macs_g": published.macs_g,
        "input_size": list(record.input_size),
        "top1": published.top1,
        "note": published.note,
        "source": published.source,
    }


def _row(record: Any, notes: list[str]) -> tuple[str, ...]:
    published = record.published
    if published.note and published.note not in notes:
        notes.append(published.note)
    return (
        record.name,
        record.family,
        with_thousands(record.params),
        "-" if published.macs_g is None else _with_decimals(published.macs_g),
        "x".join(str(side) for side in record.input_size[1:]),
        "-" if published.top1 is None else f"{published.top1:.1f}",
        f"({notes.index(published.note) + 1})" if published.note else "",
    )


def _with_decimals(number: float) -> str:
    text = f"{number:g}"
    return text if "." in text else f"{text}.0"
