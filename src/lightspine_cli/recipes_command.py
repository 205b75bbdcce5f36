"""List the training recipes that ship with the package, with what the papers print for them."""

import argparse

from lightspine_cli._output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine recipes`."""
    parser.add_argument("pattern", nargs="?", default="", help="part of a name, such as 'vim' or 'digits'")
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    """Print the table; status 2 when no name matches."""
    from lightspine.errors import UsageError
    from lightspine.recipes import describe_recipe, list_published, list_recipes

    names = [name for name in list_recipes() if args.pattern in name]
    if not names:
        raise UsageError(f"no recipe has {args.pattern!r} in its name; `lightspine recipes` lists all")
    published = {entry.recipe: entry for entry in list_published()}
    objects = []
    for name in names:
        entry = published.get(name)
        objects.append(
            {
                "name": name,
                "description": describe_recipe(name),
                "published_top1": entry.top1 if entry else None,
                "note": entry.note if entry else "",
                "source": entry.source if entry else "",
            }
        )
    if args.json:
        print_json(objects)
        return 0
    print_table(
        ("recipe", ">published top-1 %", "what it does"),
        [(item["name"], _score(item["published_top1"]), item["description"]) for item in objects],
    )
    print()
    print("Published scores are those of the papers on ImageNet-1k, not measured here.")
    print("Train one with `lightspine train --config NAME`; `--print_config` shows all of it.")
    return 0


def _score(top1: float | None) -> str:
    return "-" if top1 is None else f"{top1:.1f}"
