"""Compute the features of any number of images: the vector before the classifier, or those of the stages."""

import argparse
from pathlib import Path

from lightspine_cli._inference_arguments import add_bulk, add_preparation, bulk_options, print_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine embed`."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint file, or a name with --checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="weights, where MODEL is a name")
    parser.add_argument(
        "--stage",
        action="append",
        metavar="pooled|all|N",
        help="the vector before the classifier (default), every stage, or stage N from 0; may be repeated",
    )
    parser.add_argument("--maps", action="store_true", help="keep the stages' maps instead of their average")
    add_preparation(parser)
    parser.add_argument("--device", default="cpu", help="torch's name of the device (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print what was done as an object")
    add_bulk(parser, ("npy", "parquet"))


def run(args: argparse.Namespace) -> int:
    """Write the features and tell where they are."""
    from lightspine.errors import UsageError
    from lightspine.evaluation import embed_images

    if args.data is None or args.out is None:
        raise UsageError("expected --data with the images and --out with a folder for their features")
    outcome = embed_images(
        args.model,
        args.data,
        args.out,
        stages=args.stage or ["pooled"],
        maps=args.maps,
        format=args.format,
        options=bulk_options(args, args.checkpoint),
    )
    print_run(outcome, args, "index.csv" if args.format == "npy" else "features.parquet")
    return 0
