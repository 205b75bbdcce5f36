"""Tell what is in image files: classes, of a few or with --data of any number; objects; classes of pixels."""

import argparse
from pathlib import Path
from typing import Any

from lightspine_cli._dense_options import PREDICT, add_prediction, detect_task, reject_inapplicable_options
from lightspine_cli._dense_output import predict_dense_files
from lightspine_cli._inference_arguments import (
    add_bulk,
    add_preparation,
    bulk_options,
    preparation,
    print_run,
    take_checkpoint,
)
from lightspine_cli._output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine predict`."""
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="a checkpoint or an exported .onnx file, unless --checkpoint names it; then image files, for a "
        "detector or segmenter folders too",
    )
    parser.add_argument("--checkpoint", type=Path, help="weights: ours, an official file or timm's")
    parser.add_argument("--model", metavar="NAME", help="the model's name, for a file that does not tell")
    parser.add_argument("--topk", type=int, default=5, help="how many classes to tell (default: %(default)s)")
    add_preparation(parser)
    parser.add_argument("--device", default="cpu", help="torch's name of the device (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print objects")
    add_prediction(parser)
    add_bulk(parser, ("csv", "parquet"))


def run(args: argparse.Namespace) -> int:
    """Print the classes and probabilities of each image, or write those of many."""
    from lightspine.errors import UsageError

    args.images = take_checkpoint(args, args.images)
    kind = detect_task(args)
    reject_inapplicable_options(args, kind, PREDICT)
    if kind != "classifier":
        return predict_dense_files(args)
    if bool(args.images) == bool(args.data) or (args.data is None) != (args.out is None):
        raise UsageError("expected either image files, or --data and --out")
    return _predict_many(args) if args.data else _predict_few(args)


def _predict_many(args: argparse.Namespace) -> int:
    from lightspine.evaluation import predict_images

    outcome = predict_images(
        args.model or args.checkpoint,
        args.data,
        args.out,
        topk=args.topk,
        format=args.format,
        options=bulk_options(args, args.checkpoint if args.model else None),
    )
    print_run(outcome, args, f"predictions.{args.format}")
    return 0


def _predict_few(args: argparse.Namespace) -> int:
    from lightspine.evaluation import predict

    predictions = predict(
        args.model or args.checkpoint,
        args.images,
        checkpoint=args.checkpoint if args.model else None,
        topk=args.topk,
        device=args.device,
        **preparation(args),
    )
    if args.json:
        print_json([_as_object(prediction) for prediction in predictions])
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


def _as_object(prediction: Any) -> dict[str, Any]:
    return {
        "image": str(prediction.path),
        "classes": [{"name": score.name, "probability": score.probability} for score in prediction.classes],
    }
