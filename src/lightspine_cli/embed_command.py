"""Compute image embeddings: the pooled features before the classifier, or the features of the stages."""

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
        help="pooled features (default), all stages, or stage N from 0; can be repeated",
    )
    parser.add_argument(
        "--maps", action="store_true", help="save the feature maps of the stages, not their averages"
    )
    add_preprocessing_options(parser)
    parser.add_argument("--device", default="cpu", help="PyTorch device (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_batch_inference_options(parser, ("npy", "parquet"))


def run(args: argparse.Namespace) -> int:
    """Compute and write the features, and print a summary."""
    from lightspine.errors import UsageError
    from lightspine.evaluation import embed_images

    if args.data is None or args.out is None:
        raise UsageError("expected --data with the images and --out with a folder for the features")
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
