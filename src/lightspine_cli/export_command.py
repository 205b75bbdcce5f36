"""Export a model to ONNX, torch.export or Core ML; the file is written only if it agrees with PyTorch.

NAME alone exports random weights: pass a checkpoint with --checkpoint or instead of NAME.
"""

import argparse
from pathlib import Path
from typing import Any

from lightspine_cli._inference_options import add_detector_options
from lightspine_cli._output import print_json, print_pairs, print_table, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine export`."""
    parser.add_argument("model", metavar="NAME|CHECKPOINT", help="model name or checkpoint file")
    parser.add_argument("out", metavar="OUT", type=Path, help="output file: .onnx, .pt2 or .mlpackage")
    parser.add_argument(
        "--to", choices=("onnx", "pt2", "coreml"), default="onnx", help="format (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights file, if a model name is given"
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="raw (model) or EMA weights; auto: those of the published score (default: auto)",
    )
    parser.add_argument(
        "--features",
        action="store_true",
        help="output the feature maps of the stages; for a detector the levels of its pyramid",
    )
    parser.add_argument("--fixed-size", type=_size, metavar="HxW", help="fixed image size (default: dynamic)")
    parser.add_argument(
        "--scan",
        choices=("loop", "inlined", "unrolled"),
        help="form of the scans of VMamba and Vim: a function with a loop, the loop without a function, or "
        "every step, which needs --fixed-size (default: loop, for coreml unrolled)",
    )
    onnx = parser.add_argument_group("ONNX")
    onnx.add_argument("--opset", type=int, default=20, help="ONNX opset version (default: %(default)s)")
    onnx.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8-dynamic", "int8-static"),
        default="fp32",
        help="numeric precision (default: %(default)s)",
    )
    onnx.add_argument("--calibration", type=Path, metavar="FOLDER", help="calibration images for int8-static")
    onnx.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="input 8-bit pixels (B, H, W, 3) and normalize them in the graph; a detector also resizes them",
    )
    onnx.add_argument(
        "--class-map", action="store_true", help="a segmenter outputs the class of every pixel, not logits"
    )
    detectors = parser.add_argument_group("detectors in ONNX")
    add_detector_options(detectors, "the checkpoint's")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Export the model, compare the file with PyTorch and print a report."""
    from lightspine.errors import UsageError

    detector_options = {
        "resize": None if args.resize is None else tuple(args.resize),
        "score_threshold": args.score_threshold,
        "detections_per_image": args.detections_per_image,
    }
    detector_options = {name: value for name, value in detector_options.items() if value is not None}
    onnx_only = {
        "--opset": args.opset != 20,
        "--precision": args.precision != "fp32",
        "--calibration": args.calibration is not None,
        "--with-preprocessing": args.with_preprocessing,
        "--class-map": args.class_map,
    }
    if args.to != "onnx" and any(onnx_only.values()):
        given = ", ".join(name for name, is_given in onnx_only.items() if is_given)
        raise UsageError(f"{given} is only for --to onnx, got --to {args.to}")
    model, known = _load(args, detector_options)
    report = _write(args, model, known)
    if args.json:
        print_json(_as_object(report))
        return 0
    print_pairs(
        [
            ("file", f"{report.path}, {report.bytes:,} bytes"),
            (
                "weights",
                f"{report.weight_bytes:,} bytes in PyTorch, ratio {report.bytes / report.weight_bytes:.3f}",
            ),
            ("operators", f"{report.nodes:,}"),
            ("tolerance", f"relative difference from PyTorch up to {report.tolerance:.0e}"),
        ]
    )
    if report.differences:
        print_text()
        print_table(
            (">images", ">height", ">width", ">largest difference", ">relative"),
            [
                (*map(str, found.shape), f"{found.largest:.1e}", f"{found.relative:.1e}")
                for found in report.differences
            ],
        )
    return 0


def _load(args: argparse.Namespace, detector_options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model and the metadata to store in the exported file."""
    import logging

    from lightspine import create_model
    from lightspine.evaluation.classifiers import class_names, load_classifier
    from lightspine.models.checkpoint import read_checkpoint
    from lightspine.models.loading import is_checkpoint

    file = args.checkpoint or (Path(args.model) if is_checkpoint(args.model) else None)
    if file is None:
        _refuse_detector_options(detector_options, args.model)
        logging.getLogger("lightspine").warning(
            "%s is exported with random weights: pass a checkpoint for trained weights", args.model
        )
        return create_model(args.model, features_only=args.features).eval(), {}
    opened = read_checkpoint(file)
    assert opened.path is not None
    source = {"file": opened.path.name, "sha256": _hash(opened.path)}
    if opened.is_dense:
        network, known = _load_dense(args, opened, detector_options)
        return network, known | {"source": source}
    _refuse_detector_options(detector_options, str(file))
    if args.checkpoint:
        model, saved = load_classifier(args.model, opened, weights=args.weights)
    else:
        model, saved = load_classifier(opened, weights=args.weights)
    known = {"preprocessing": saved.preprocessing, "source": source, "checkpoint": opened.metadata}
    if args.features:
        name = args.model if args.checkpoint else saved.name
        options = saved.kwargs | {"features_only": True}
        return create_model(name, checkpoint=opened, weights=args.weights, **options).eval(), known
    count = int(getattr(model, "num_classes", 0))
    return model, known | {"class_names": class_names(saved, count) if count else None}


def _load_dense(
    args: argparse.Namespace, opened: Any, detector_options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return a detector, its backbone with --features, or a segmenter, and its metadata."""
    from lightspine.dense import load_network
    from lightspine.dense.checkpoint import network_metadata, read_network_metadata
    from lightspine.errors import UsageError
    from lightspine.evaluation.detection import check_detection_options

    kind = read_network_metadata(opened).kind
    if args.checkpoint or (args.features and kind == "segmenter"):
        raise UsageError(
            f"{opened.label} holds a {kind}: expected it instead of NAME"
            f"{' and without --features' if args.features else ''}"
        )
    if kind == "segmenter" or args.features or args.to != "onnx":
        _refuse_detector_options(detector_options, opened.label)
    check_detection_options(detector_options)
    network, about = load_network(opened, weights=args.weights, **detector_options)
    # Published files of OpenMMLab have no metadata of their own.
    described = network_metadata(
        network,
        class_names=about.class_names,
        preprocessing=about.preprocessing,
        settings=about.settings,
    )
    known = {
        "class_names": about.class_names,
        "preprocessing": about.preprocessing or None,
        "checkpoint": described | opened.metadata,
    }
    return network.backbone if args.features else network, known


def _refuse_detector_options(options: dict[str, Any], name: str) -> None:
    from lightspine.errors import UsageError

    if options:
        flag = "--" + next(iter(options)).replace("_", "-")
        raise UsageError(f"{flag} is for a whole detector in ONNX, got {name}")


def _write(args: argparse.Namespace, model: Any, known: dict[str, Any]) -> Any:
    if args.to == "pt2":
        from lightspine.export.pt2_file import export_pt2

        return export_pt2(model, args.out, scan=args.scan, fixed_size=args.fixed_size, **known)
    if args.to == "coreml":
        from lightspine.export.coreml_file import export_coreml

        return export_coreml(model, args.out, fixed_size=args.fixed_size, **known)
    from lightspine.export import export_onnx

    return export_onnx(
        model,
        args.out,
        opset=args.opset,
        precision=args.precision,
        calibration=args.calibration,
        scan=args.scan or "loop",
        with_preprocessing=args.with_preprocessing,
        class_map=args.class_map,
        fixed_size=args.fixed_size,
        **known,
    )


def _as_object(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report) | {"path": str(report.path)}


def _hash(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a size such as 224x224, got {text!r}")
    return int(height), int(width)
