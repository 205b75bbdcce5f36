"""Tell the likeliest classes of image files."""

import argparse
from pathlib import Path

from lightspine_cli._output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine predict`."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="weights: ours, an official file or timm's"
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name, for a file that does not tell")
    parser.add_argument("--topk", type=int, default=5, help="how many classes to tell (default: %(default)s)")
    parser.add_argument("--size", type=int, help="image size in pixels instead of the checkpoint's own")
    parser.add_argument("--device", default="cpu", help="torch's name of the device (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    """Print the classes and probabilities of each image."""
    from lightspine.evaluation import predict

    predictions = predict(
        args.model or args.checkpoint,
        args.images,
        checkpoint=args.checkpoint if args.model else None,
        topk=args.topk,
        image_size=args.size,
        device=args.device,
    )
    if args.json:
        print_json(
            [
                {
                    "image": str(prediction.path),
                    "classes": [
                        {"name": score.name, "probability": score.probability} for score in prediction.classes
                    ],
                }
                for prediction in predictions
            ]
        )
        return 0
    print_table(
        ("image", "class", ">probability"),
        [
            (str(prediction.path) if rank == 0 else "", score.name, f"{100 * score.probability:.1f} %")
            for prediction in predictions
            for rank, score in enumerate(prediction.classes)
        ],
    )
    return 0
