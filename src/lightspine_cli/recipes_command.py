"""List the shipped training recipes and their published scores."""

import argparse
import dataclasses
from typing import Any

from lightspine_cli._output import print_json, print_table, print_text, with_thousands

_COLUMNS = ("recipe", "model", "task", "data", ">batch", ">epochs", ">published %")
_TASK = _COLUMNS.index("task")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine recipes`."""
    parser.add_argument("pattern", nargs="?", default="", help="part of a name, such as 'vim' or 'digits'")
    parser.add_argument(
        "--task",
        choices=("classification", "detection", "segmentation"),
        help="list only recipes of this task",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the recipes as a table or as JSON.

    Raises:
        UsageError: no recipe matches.
    """
    from lightspine.errors import UsageError
    from lightspine.recipes import list_recipes, summarize_recipe

    summaries = [summarize_recipe(name) for name in list_recipes() if args.pattern in name]
    summaries = [summary for summary in summaries if args.task in (None, summary.task)]
    if not summaries:
        kind = f"{args.task} recipe" if args.task else "recipe"
        raise UsageError(
            f"no {kind} has {args.pattern!r} in its name; `lightspine recipes` lists all recipes"
        )
    if args.json:
        print_json([_summary_as_dict(summary) for summary in summaries])
        return 0
    rows = [_COLUMNS, *(_table_row(summary) for summary in summaries)]
    if args.task:
        # The task is equal in all rows, and the table fits into 120 columns without it.
        rows = [row[:_TASK] + row[_TASK + 1 :] for row in rows]
    print_table(rows[0], rows[1:])
    print_text()
    print_text("Published scores are those of the papers, not measured here: top-1 accuracy, box / mask AP,")
    print_text("or single-scale / multi-scale mIoU. Batch is the total batch size over all devices.")
    print_text("Train with `lightspine train --config RECIPE`; `--print_config` prints the complete recipe.")
    return 0


def _summary_as_dict(summary: Any) -> dict[str, Any]:
    from lightspine.recipes import SCORES

    content = dataclasses.asdict(summary)
    published = content.pop("published") or {}
    scores = {f"published_{name}": published.get(name) for name in SCORES}
    return content | scores | {key: published.get(key, "") for key in ("note", "source")}


def _table_row(summary: Any) -> tuple[str, ...]:
    from lightspine.recipes import SCORES

    scores = [getattr(summary.published, name, None) for name in SCORES]
    return (
        summary.name,
        summary.model,
        summary.task,
        summary.data,
        with_thousands(summary.batch_size),
        str(summary.epochs),
        " / ".join(f"{score:.1f}" for score in scores if score is not None) or "-",
    )
