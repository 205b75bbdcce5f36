"""Draw images of a dataset with their ground truth, as the trainer sees them.

DATA is a COCO folder (boxes and masks), a folder of images and label maps, or a folder of class folders. Look
at the pictures before training: shifted boxes, exchanged classes and masks of the wrong value show at once.
"""

import argparse
from pathlib import Path

from lightspine_cli._output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine show`."""
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=16, help="number of images (default: %(default)s)")
    parser.add_argument(
        "--augmented", action="store_true", help="draw the images after the augmentation of training"
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="recipe whose data settings are used (default: those of the data module for the layout of DATA)",
    )
    parser.add_argument("--boxes", action="store_true", help="COCO: read the boxes but not the masks")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the choice of images and the augmentation (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the drawn images as JSON")


def run(args: argparse.Namespace) -> int:
    """Draw the images, and print what they show."""
    from lightspine.errors import UsageError
    from lightspine.evaluation.ground_truth import draw_ground_truth

    if args.out.is_file():
        raise UsageError(f"expected a folder for --out, got the file {args.out}")
    drawn = draw_ground_truth(
        args.data,
        args.out,
        split=args.split,
        count=args.count,
        augmented=args.augmented,
        recipe=args.config,
        boxes_only=args.boxes,
        seed=args.seed,
        progress=True,
    )
    if args.json:
        print_json([{"image": s.image, "content": s.content, "picture": str(s.picture)} for s in drawn])
        return 0
    print_table(("image", "ground truth", "picture"), [(s.image, s.content, str(s.picture)) for s in drawn])
    return 0
