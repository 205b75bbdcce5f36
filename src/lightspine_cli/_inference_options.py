"""Options shared by `evaluate`, `predict` and `embed`, with the tasks that they apply to."""

import argparse
from pathlib import Path
from typing import Any

# The library calls raw weights "model", their entry in official files.
_WEIGHTS = {"auto": "auto", "raw": "model", "ema": "ema"}
_CHECKPOINT_SUFFIXES = {".onnx", ".pt2", ".safetensors", ".pth", ".pt", ".ckpt", ".bin"}

_CLASSIFIER, _DETECTOR, _SEGMENTER = {"classifier"}, {"detector"}, {"segmenter"}
_SHARED_TASKS = {
    "resize": _DETECTOR,
    "score_threshold": _DETECTOR,
    "detections_per_image": _DETECTOR,
    "scale": _SEGMENTER,
    "own_size": _SEGMENTER,
    "window": _SEGMENTER,
    "stride": _SEGMENTER,
    "ratios": _SEGMENTER,
    "flip": _SEGMENTER,
    "multi_scale": _SEGMENTER,
    "model": _CLASSIFIER,
    "image_size": _CLASSIFIER,
    "crop_pct": _CLASSIFIER,
    "crop_mode": _CLASSIFIER,
}
EVALUATE_TASKS = _SHARED_TASKS | {
    "images": _DETECTOR,
    "split": _DETECTOR | _SEGMENTER,
    "class_mapping": _CLASSIFIER,
    "batch_size": _CLASSIFIER | _DETECTOR,
}
"""Option of `evaluate` -> tasks that it applies to; other options apply to all tasks."""

PREDICT_TASKS = _SHARED_TASKS | {
    "coco": _DETECTOR,
    "max_drawn": _DETECTOR,
    "labels": _SEGMENTER,
    "topk": _CLASSIFIER,
    "data": _CLASSIFIER,
    "resume": _CLASSIFIER,
    "devices": _CLASSIFIER,
    "rank_timeout": _CLASSIFIER,
    "part_size": _CLASSIFIER,
    "format": _CLASSIFIER,
    "batch_size": _CLASSIFIER,
    "workers": _CLASSIFIER,
}
"""Option of `predict` -> tasks that it applies to; other options apply to all tasks."""

_SHORT_FLAGS = {"image_size": "--size"}


def add_preprocessing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for weights and image preprocessing of a classifier."""
    parser.add_argument(
        "--weights",
        choices=tuple(_WEIGHTS),
        default="auto",
        help="raw or EMA weights of a file with both; auto: those of the published score",
    )
    parser.add_argument(
        "--image-size", "--size", type=int, metavar="PX", help="image size (default: the checkpoint's)"
    )
    parser.add_argument("--crop-pct", type=float, help="crop size as a fraction of the resized shorter side")
    parser.add_argument(
        "--crop-mode",
        choices=("center", "squash", "border"),
        help="squash: resize both sides to the image size, ignoring the aspect ratio",
    )


def add_batch_inference_options(parser: argparse.ArgumentParser, formats: tuple[str, ...]) -> None:
    """Add the options of batch inference."""
    group = parser.add_argument_group("batch inference over any number of images")
    group.add_argument(
        "--data",
        metavar="FOLDER|SHARDS",
        help="folder with images at any depth, or .tar shards such as 'a-{000..012}.tar'",
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="output folder; must be new without --resume")
    group.add_argument(
        "--format",
        choices=formats,
        default=formats[0],
        help="parquet needs lightspine[parquet] (default: %(default)s)",
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted run in --out")
    group.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="number of processes, one device each (default: %(default)s)",
    )
    group.add_argument(
        "--rank-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds after which the run ends if a process does not answer, or computes no batch while the "
        "others wait (default: %(default)g)",
    )
    group.add_argument(
        "--batch-size", type=int, default=64, help="images per forward pass (default: %(default)s)"
    )
    group.add_argument(
        "--workers", type=int, default=0, help="data loader processes per device (default: %(default)s)"
    )
    group.add_argument(
        "--part-size", type=int, default=1024, help="images per intermediate file (default: %(default)s)"
    )


def add_dense_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate` for detectors and segmenters."""
    both = parser.add_argument_group("detectors and segmenters")
    both.add_argument(
        "--split", help="split of the data, such as val2017 or val; for a segmenter's folder also train"
    )
    detectors = parser.add_argument_group("detectors")
    detectors.add_argument(
        "--images", type=Path, metavar="DIR", help="image folder, if it is not next to the annotations"
    )
    add_detector_options(detectors, "the checkpoint's")
    _add_segmenter_options(parser)


def add_dense_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `predict` for detectors and segmenters."""
    detectors = parser.add_argument_group("detectors (--out: folder for the drawings)")
    add_detector_options(detectors, "0.5")
    detectors.add_argument(
        "--max-drawn",
        type=int,
        metavar="N",
        help="maximum number of objects drawn into an image (default: 100)",
    )
    detectors.add_argument("--coco", type=Path, metavar="FILE", help="write the objects as COCO results")
    segmenters = _add_segmenter_options(parser)
    segmenters.add_argument("--labels", action="store_true", help="also write label maps to --out")


def add_detector_options(group: argparse._ArgumentGroup, default_score: str) -> None:
    """Add the options of a detector's predictions."""
    group.add_argument(
        "--resize",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        help="shorter side and maximum longer side of the images in pixels",
    )
    group.add_argument(
        "--score-threshold", type=float, help=f"minimum score of a detection (default: {default_score})"
    )
    group.add_argument(
        "--detections-per-image",
        type=int,
        metavar="N",
        help="maximum number of detections per image (default: the checkpoint's)",
    )


def _add_segmenter_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("segmenters (defaults: the checkpoint's)")
    group.add_argument(
        "--scale",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        help="maximum shorter and longer side of the resized images in pixels",
    )
    group.add_argument("--own-size", action="store_true", help="do not resize the images")
    group.add_argument(
        "--window", type=int, nargs=2, metavar=("H", "W"), help="size of the sliding window in pixels"
    )
    group.add_argument(
        "--stride", type=int, nargs=2, metavar=("H", "W"), help="stride of the sliding window in pixels"
    )
    group.add_argument(
        "--ratios", type=float, nargs="+", metavar="R", help="scale factors of multi-scale inference"
    )
    group.add_argument(
        "--flip", action="store_true", help="average with the predictions for the flipped image"
    )
    group.add_argument(
        "--multi-scale",
        action="store_true",
        help="multi-scale and flip as published: ratios 0.5 to 1.75, --flip",
    )
    return group


def take_checkpoint(args: argparse.Namespace, files: list[Path]) -> list[Path]:
    """Use the first file as checkpoint if it has a checkpoint suffix; return the other files.

    Raises:
        UsageError: there is no checkpoint, or there are two.
    """
    from lightspine.errors import UsageError

    first = files[0] if files and files[0].suffix.lower() in _CHECKPOINT_SUFFIXES else None
    if first is None and args.checkpoint is None:
        raise UsageError(
            "expected a checkpoint: a .safetensors, .ckpt, .pth or .onnx file as first argument, or "
            "--checkpoint"
        )
    if first is None:
        return files
    if args.checkpoint is not None:
        raise UsageError(f"expected one checkpoint, got {first} and --checkpoint {args.checkpoint}")
    args.checkpoint = first
    return files[1:]


def detect_task(path: Path) -> tuple[str, Any]:
    """Return "classifier", "detector" or "segmenter", and the opened checkpoint or the path of an .onnx file.

    Raises:
        LightspineError: the file cannot be read.
    """
    from lightspine.dense.checkpoint import read_network_metadata
    from lightspine.export.onnx_network import is_onnx_file, read_onnx_metadata
    from lightspine.models.checkpoint import read_checkpoint

    # A missing file is reported later, because the path may be a model name.
    if not path.is_file():
        return "classifier", path
    is_exported = is_onnx_file(path)
    checkpoint = read_onnx_metadata(path) if is_exported else read_checkpoint(path)
    task = read_network_metadata(checkpoint).kind if checkpoint.is_dense else "classifier"
    return task, path if is_exported else checkpoint


def reject_inapplicable_options(args: argparse.Namespace, task: str, options: dict[str, set[str]]) -> None:
    """Reject options on the command line that do not apply to a task.

    Raises:
        UsageError: there is such an option.
    """
    from lightspine.errors import UsageError

    # Search the arguments as typed, because a value may equal the default.
    typed = {argument.partition("=")[0] for argument in args.arguments}
    for name, tasks in options.items():
        flag = "--" + name.replace("_", "-")
        if task not in tasks and typed & {flag, _SHORT_FLAGS.get(name, flag)}:
            raise UsageError(
                f"{flag} is for a {' or '.join(sorted(tasks))}, but {args.checkpoint} is a {task}"
            )


def preprocessing_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the library arguments for the options of `add_preprocessing_options`."""
    return {
        "weights": _WEIGHTS[args.weights],
        "image_size": args.image_size,
        "crop_pct": args.crop_pct,
        "crop_mode": args.crop_mode,
    }


def inference_options(args: argparse.Namespace, checkpoint: Path | None) -> Any:
    """Return the `InferenceOptions` of a command line."""
    from lightspine.evaluation import InferenceOptions

    return InferenceOptions(
        checkpoint=checkpoint,
        batch_size=args.batch_size,
        part_size=args.part_size,
        num_workers=args.workers,
        device=args.device,
        devices=args.devices,
        rank_timeout=args.rank_timeout,
        resume=args.resume,
        progress=True,
        **preprocessing_arguments(args),
    )


def print_outcome(outcome: dict[str, Any], args: argparse.Namespace, rows: str) -> None:
    """Print the summary of a batch inference run."""
    from lightspine_cli._output import print_json, print_pairs

    if args.json:
        print_json(outcome)
        return
    print_pairs(
        [
            ("images", f"{outcome['images']}, {outcome['bad']} of them bad"),
            (
                "computed",
                f"{outcome['computed']} in {outcome['seconds']:.1f} s, "
                f"{outcome['images_per_second']:.1f} images/s, {outcome['devices']} x {outcome['device']}",
            ),
            ("rows", str(args.out / rows)),
            ("bad images", str(args.out / "bad_images.csv")),
        ]
    )
