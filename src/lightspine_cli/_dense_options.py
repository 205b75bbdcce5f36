"""The options of `evaluate` and `predict` that only detectors or segmenters know, and who may use which."""

import argparse
from collections.abc import Iterable
from pathlib import Path

# option -> what kinds of network it means something for
_TESTS = {
    "resize": {"detector"},
    "score_threshold": {"detector"},
    "detections_per_image": {"detector"},
    "scale": {"segmenter"},
    "own_size": {"segmenter"},
    "window": {"segmenter"},
    "stride": {"segmenter"},
    "ratios": {"segmenter"},
    "flip": {"segmenter"},
    "multi_scale": {"segmenter"},
}
EVALUATE = _TESTS | {
    "images": {"detector"},
    "split": {"detector", "segmenter"},
    "model": {"classifier"},
    "class_mapping": {"classifier"},
    "weights": {"classifier"},
    "image_size": {"classifier"},
    "crop_pct": {"classifier"},
    "crop_mode": {"classifier"},
    "val_fraction": {"classifier", "segmenter"},
    "seed": {"classifier", "segmenter"},
    "batch_size": {"classifier", "detector"},
}
PREDICT = _TESTS | {
    "coco": {"detector"},
    "labels": {"segmenter"},
    "model": {"classifier"},
    "topk": {"classifier"},
    "weights": {"classifier"},
    "image_size": {"classifier"},
    "crop_pct": {"classifier"},
    "crop_mode": {"classifier"},
    "data": {"classifier"},
    "resume": {"classifier"},
    "devices": {"classifier"},
    "part_size": {"classifier"},
    "format": {"classifier"},
    "batch_size": {"classifier"},
    "workers": {"classifier"},
}
_SHORT = {"image_size": "--size"}


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Declare what the evaluation of detectors and segmenters has of its own."""
    both = parser.add_argument_group("detectors and segmenters")
    both.add_argument("--split", help="of the data: val2017 or val; a segmenter's folder also has train")
    detectors = parser.add_argument_group("detectors")
    detectors.add_argument(
        "--images", type=Path, metavar="DIR", help="images of a COCO file that lie elsewhere than COCO's"
    )
    _add_detector_options(detectors, "the checkpoint's")
    _add_segmenter_options(parser)


def add_prediction(parser: argparse.ArgumentParser) -> None:
    """Declare what the predictions of detectors and segmenters have of their own."""
    detectors = parser.add_argument_group("detectors (--out is the folder for the pictures)")
    _add_detector_options(detectors, "0.5")
    detectors.add_argument("--coco", type=Path, metavar="FILE", help="write the objects as COCO results")
    segmenters = _add_segmenter_options(parser)
    segmenters.add_argument("--labels", action="store_true", help="write the label maps into --out too")


def _add_detector_options(group: argparse._ArgumentGroup, least_score: str) -> None:
    group.add_argument(
        "--resize", type=int, nargs=2, metavar=("SHORT", "LONG"), help="sides of the images in pixels"
    )
    group.add_argument(
        "--score-threshold", type=float, help=f"least score that counts (default: {least_score})"
    )
    group.add_argument(
        "--detections-per-image", type=int, metavar="N", help="most detections (default: the checkpoint's)"
    )


def _add_segmenter_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    segmenters = parser.add_argument_group("segmenters (default: as the checkpoint says)")
    segmenters.add_argument(
        "--scale", type=int, nargs=2, metavar=("LONG", "SHORT"), help="rectangle that images fit into"
    )
    segmenters.add_argument("--own-size", action="store_true", help="leave the images at their own size")
    segmenters.add_argument(
        "--window", type=int, nargs=2, metavar=("H", "W"), help="slide a window over each image"
    )
    segmenters.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="of the window")
    segmenters.add_argument(
        "--ratios", type=float, nargs="+", metavar="R", help="average over these sizes of the image"
    )
    segmenters.add_argument("--flip", action="store_true", help="average over the mirrored image too")
    segmenters.add_argument(
        "--multi-scale", action="store_true", help="the published test: ratios 0.5 to 1.75, mirrored"
    )
    return segmenters


def detect_task(args: argparse.Namespace) -> str:
    """Return "classifier", "detector" or "segmenter", whichever the checkpoint holds."""
    from lightspine.dense.checkpoint import is_network_file, read_network_metadata

    # What is no file is reported by the command, which may be given a model's name as well.
    if (
        args.checkpoint.suffix == ".onnx"
        or not args.checkpoint.is_file()
        or not is_network_file(args.checkpoint)
    ):
        return "classifier"
    return read_network_metadata(args.checkpoint).kind


def reject_inapplicable_options(args: argparse.Namespace, kind: str, options: dict[str, set[str]]) -> None:
    """Refuse options that were given and mean nothing for a kind of network.

    Raises:
        UsageError: there is one.
    """
    from lightspine.errors import UsageError

    for name, kinds in options.items():
        flag = "--" + name.replace("_", "-")
        # As typed: an option that is given its usual value is as foreign as any other.
        typed = {argument.partition("=")[0] for argument in args.arguments}
        if kind not in kinds and typed & {flag, _SHORT.get(name, flag)}:
            raise UsageError(f"{flag} is for a {_or(sorted(kinds))}, but {args.checkpoint} holds a {kind}")


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)
