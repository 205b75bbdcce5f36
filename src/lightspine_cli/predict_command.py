"""Predict classes, objects or segmentation maps of images; --data runs batch inference on many images."""

import argparse
from pathlib import Path
from typing import Any

from lightspine_cli._dense_output import predict_dense_files
from lightspine_cli._inference_options import (
    PREDICT_TASKS,
    add_batch_inference_options,
    add_dense_prediction_options,
    add_preprocessing_options,
    detect_task,
    inference_options,
    preprocessing_arguments,
    print_outcome,
    reject_inapplicable_options,
    take_checkpoint,
)
from lightspine_cli._output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine predict`."""
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="checkpoint or exported .onnx file, unless --checkpoint is given; then image files, for a "
        "detector or segmenter also folders",
    )
    parser.add_argument("--checkpoint", type=Path, help="weights file: lightspine's, official or timm's")
    parser.add_argument("--model", metavar="NAME", help="model name, for a file that does not store it")
    parser.add_argument("--topk", type=int, default=5, help="classes per image (default: %(default)s)")
    add_preprocessing_options(parser)
    parser.add_argument("--device", default="cpu", help="PyTorch device (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the predictions as JSON")
    add_dense_prediction_options(parser)
    add_batch_inference_options(parser, ("csv", "parquet"))


def run(args: argparse.Namespace) -> int:
    """Print the predictions for image files, or run batch inference with --data."""
    from lightspine.errors import UsageError

    args.images = take_checkpoint(args, args.images)
    task, checkpoint = detect_task(args.checkpoint)
    reject_inapplicable_options(args, task, PREDICT_TASKS)
    if task != "classifier":
        return predict_dense_files(args, checkpoint)
    if args.images and args.data:
        raise UsageError("expected either image files or --data, got both")
    if not args.images and args.data is None:
        raise UsageError("expected image files, or --data with a folder or shards, got neither")
    if args.data is not None and args.out is None:
        raise UsageError("expected --out with a folder for the predictions of --data, got none")
    if args.images and args.out is not None:
        raise UsageError(
            f"--out is for --data or for a detector or segmenter, but {args.checkpoint} is a classifier: "
            "leave it out, or pass the folder of the images as --data"
        )
    return _run_batch_inference(args) if args.data else _predict_files(args, checkpoint)


def _run_batch_inference(args: argparse.Namespace) -> int:
    from lightspine.evaluation import predict_images

    outcome = predict_images(
        args.model or args.checkpoint,
        args.data,
        args.out,
        topk=args.topk,
        format=args.format,
        options=inference_options(args, args.checkpoint if args.model else None),
    )
    print_outcome(outcome, args, f"predictions.{args.format}")
    return 0


def _predict_files(args: argparse.Namespace, checkpoint: Any) -> int:
    from lightspine.evaluation import predict

    predictions = predict(
        args.model or checkpoint,
        args.images,
        checkpoint=checkpoint if args.model else None,
        topk=args.topk,
        device=args.device,
        **preprocessing_arguments(args),
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
