"""Train several models on the same images and compare accuracy, latency and size."""

import argparse
from pathlib import Path

from lightspine_cli._compare_output import print_comparison
from lightspine_cli._output import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine compare`."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER|digits",
        help="folder with train/CLASS/* and val/CLASS/*, or CLASS/* to be split, or digits",
    )
    parser.add_argument(
        "--models",
        required=True,
        metavar="A,B,C",
        help="models of lightspine (see `lightspine list`) or timm; NAME.TAG starts from published weights",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("lightspine-compare"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=10, help="training epochs (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="image size in pixels (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--augmentation",
        choices=("none", "light", "medium", "strong"),
        default="medium",
        help="augmentation of the images in a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.2,
        help="held-out fraction if there is no val folder (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=2, help="data loader processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu, mps or auto (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")


def run(args: argparse.Namespace) -> int:
    """Check the arguments, then train and measure."""
    from lightspine.compare import check_model_names

    names = [name.strip() for name in args.models.split(",") if name.strip()]
    # Check the names before importing Lightning, which takes seconds.
    check_model_names(names)

    from dataclasses import asdict

    from lightspine.compare.compare import compare
    from lightspine.compare.runs import CompareSettings, data_of_settings, runs_of_models

    settings = CompareSettings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        size=args.size,
        lr=args.lr,
        augmentation=args.augmentation,
        val_fraction=args.val_fraction,
        num_workers=args.workers,
        seed=args.seed,
        accelerator=args.accelerator,
    )
    result = compare(
        runs_of_models(names, args.data, settings),
        args.out,
        data=data_of_settings(args.data, settings),
        settings=asdict(settings),
        # Progress bars are drawn on standard output, which holds only the JSON here.
        progress=not args.json,
    )
    if args.json:
        print_json(result.as_dict())
    else:
        print_comparison(result)
    return int(result.exit_status)
