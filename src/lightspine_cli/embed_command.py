"""Compute features of any number of images: the vector before the classifier, or maps of the stages."""

import argparse
from pathlib import Path

from lightspine_cli._inference_options import (
    add_batch_inference_options,
    add_preprocessing_options,
    inference_options,
    print_outcome,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine embed`."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint file, or a model name with --checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="weights file, if MODEL is a name")
    parser.add_argument(
        "--stage",
        action="append",
        metavar="pooled|all|N",
        help="vector before the classifier (default), all stages, or stage N from 0; may be repeated",
    )
    parser.add_argument("--maps", action="store_true", help="keep the stages' maps instead of their average")
    add_preprocessing_options(parser)
    parser.add_argument("--device", default="cpu", help="PyTorch device (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    add_batch_inference_options(parser, ("npy", "parquet"))


def run(args: argparse.Namespace) -> int:
    """Compute and write the features, and print the outcome."""
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
        options=inference_options(args, args.checkpoint),
    )
    print_outcome(outcome, args, "index.csv" if args.format == "npy" else "features.parquet")
    return 0
