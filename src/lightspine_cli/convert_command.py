"""Convert an official, timm, OpenMMLab or Lightning checkpoint to a file that stores its model."""

import argparse
from pathlib import Path

from lightspine_cli._output import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine convert`."""
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint to read")
    parser.add_argument("target", metavar="OUT.safetensors", type=Path, help="file to write")
    parser.add_argument("--model", metavar="NAME", help="model name (default: identified from the tensors)")
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="raw (model) or EMA weights; auto: those of the published score (default: auto)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint and print a loading report."""
    from typing import Any

    from lightspine.dense.factory import convert_network
    from lightspine.errors import UsageError
    from lightspine.models.checkpoint import read_checkpoint
    from lightspine.models.factory import convert_checkpoint

    source = read_checkpoint(args.source)
    if source.is_dense and args.model:
        raise UsageError(f"{args.source} holds a detector or segmenter: expected no --model")
    model: Any
    if source.is_dense:
        model = convert_network(source, args.target, weights=args.weights)
    else:
        model = convert_checkpoint(source, args.target, name=args.model, weights=args.weights)
    print_text(f"{args.target}: {model.init_args['name']}, {model.load_report}")
    return 0
