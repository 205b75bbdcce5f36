"""Train the smallest model of each family on handwritten digits and compare them.

The 1,797 digits ship with scikit-learn; nothing is downloaded.
"""

import argparse
from pathlib import Path

from lightspine_cli._compare_output import print_comparison
from lightspine_cli._output import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine demo`."""
    parser.add_argument(
        "--out", type=Path, default=Path("lightspine-demo"), help="output folder (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Compare the shipped digits recipes."""
    from lightspine.compare.compare import compare
    from lightspine.compare.runs import DIGITS, CompareData, runs_of_recipes
    from lightspine.recipes import list_recipes

    recipes = [name for name in list_recipes() if name.startswith("digits_")]
    result = compare(
        runs_of_recipes(recipes),
        args.out,
        data=CompareData(source=DIGITS, val_fraction=None, seed=0, size=64),
        settings={"recipes": recipes},
    )
    print_comparison(result)
    if result.finished:
        checkpoint = result.folder / str(result.finished[0].checkpoint)
        print_text(f"try: lightspine predict {result.folder}/images/*.png --checkpoint {checkpoint}")
    return int(result.exit_status)
