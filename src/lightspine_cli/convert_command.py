"""Turn an official, timm or Lightning checkpoint into ours: a safetensors file that names its model."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine convert`."""
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint to read")
    parser.add_argument("target", metavar="OUT.safetensors", type=Path, help="file to write")
    parser.add_argument("--model", metavar="NAME", help="the model's name; told from the tensors by default")
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="which weights of the file; by default those whose score is published",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and tell what was done with the tensors."""
    from typing import Any

    from lightspine.models.factory import convert_checkpoint

    model: Any = convert_checkpoint(args.source, args.target, name=args.model, weights=args.weights)
    print(f"{args.target}: {model.init_args['name']}, {model.load_report}")
    return 0
