"""Train several models, ours or timm's, on the same images; then one table, one plot and the checkpoints."""

import argparse
from pathlib import Path

from lightspine_cli._compare_output import print_comparison
from lightspine_cli._output import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine compare`."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER|digits",
        help="train/CLASS/* and val/CLASS/*, or CLASS/* with a share held out, or digits",
    )
    parser.add_argument(
        "--models", required=True, metavar="A,B,C", help="names of ours (see list) or of timm"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("lightspine-compare"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=int, default=10, help="passes over the images (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="image size in pixels (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument(
        "--augmentation",
        choices=("none", "light", "medium", "strong"),
        default="medium",
        help="of a folder's images (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.2,
        help="share held out where the folder has no val (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read images (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu, mps or auto (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print results.json instead of the table")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, then train and measure."""
    from lightspine.compare import check_model_names

    names = [name.strip() for name in args.models.split(",") if name.strip()]
    # Before Lightning is loaded, which takes longer than all the checks.
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
        # Bars are drawn on the standard output, which must then hold nothing but the JSON.
        progress=not args.json,
    )
    if args.json:
        print_json(result.as_dict())
    else:
        print_comparison(result)
    return int(result.exit_status)
