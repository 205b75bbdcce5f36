"""Evaluate a checkpoint on image folders, shards, digits, COCO files, or images with label maps."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from lightspine_cli._dense_output import MAX_CLASS_ROWS, evaluate_dense
from lightspine_cli._inference_options import (
    EVALUATE_TASKS,
    add_dense_evaluation_options,
    add_preprocessing_options,
    detect_task,
    preprocessing_arguments,
    reject_inapplicable_options,
    take_checkpoint,
)
from lightspine_cli._output import print_json, print_pairs, print_table, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine evaluate`."""
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="checkpoint or exported .onnx file, unless --checkpoint is given",
    )
    parser.add_argument("--checkpoint", type=Path, help="weights file: lightspine's, official or timm's")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER|FILE|digits",
        help="CLASS/*, val/CLASS/*, ImageNet's flat val, .tar shards, or digits; for a detector a COCO file "
        "or folder; for a segmenter a folder with images/val and annotations/val, or COCO data",
    )
    parser.add_argument("--model", metavar="NAME", help="model name, for a file that does not store it")
    parser.add_argument(
        "--val-fraction",
        type=float,
        help="evaluate only this fraction, held out as in training (default: the images that the training of "
        "the checkpoint held out, if it was trained on this data, else all)",
    )
    parser.add_argument("--seed", type=int, help="seed of the held-out split (default: that of the training)")
    parser.add_argument(
        "--class-mapping",
        metavar="FILE|imagenet",
        help="file that maps folders or images to classes, such as ReaL's real.json; imagenet: folders named "
        "by WordNet ids or class indices, only these classes may be predicted (ImageNet-A, -R)",
    )
    add_preprocessing_options(parser)
    parser.add_argument(
        "--batch-size", type=int, help="images per forward pass (default: 64, for a detector 1)"
    )
    parser.add_argument("--workers", type=int, default=0, help="data loader processes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="PyTorch device (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write report.json, classes.csv and confusion.png to this folder",
    )
    add_dense_evaluation_options(parser)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the metrics and, with --out, write the report."""
    from lightspine.errors import UsageError
    from lightspine.evaluation import evaluate, write_report

    if args.out is not None and (args.out.suffix == ".json" or args.out.is_file()):
        raise UsageError(f"expected a folder for --out, got {args.out}")
    if take_checkpoint(args, [args.file] if args.file is not None else []):
        raise UsageError(f"expected a checkpoint as the only positional argument, got {args.file}")
    task, checkpoint = detect_task(args.checkpoint)
    reject_inapplicable_options(args, task, EVALUATE_TASKS)
    if task != "classifier":
        return evaluate_dense(args, task, checkpoint)
    report = evaluate(
        args.model or checkpoint,
        args.data,
        checkpoint=checkpoint if args.model else None,
        val_fraction=args.val_fraction,
        seed=args.seed,
        class_mapping=args.class_mapping,
        batch_size=64 if args.batch_size is None else args.batch_size,
        num_workers=args.workers,
        device=args.device,
        progress=True,
        **preprocessing_arguments(args),
    )
    report["command"] = shlex.join(["lightspine", "evaluate", *args.arguments])
    written = write_report(report, args.out) if args.out is not None else {}
    if args.json:
        print_json(report)
        return 0
    _print_classes(report["classes"])
    _print_scores(report)
    for path in written.values():
        print_text(f"wrote {path}")
    for reason in report["skipped"].values():
        print_text(f"skipped: {reason}")
    return 0


def _print_classes(classes: dict[str, dict[str, Any]] | None) -> None:
    """Print all classes, or the 10 with the lowest accuracy of more than 50."""
    if classes is None:
        return
    rows = [
        (name, entry) for name, entry in classes.items() if entry["images"] or len(classes) <= MAX_CLASS_ROWS
    ]
    title = None
    if len(rows) > MAX_CLASS_ROWS:
        rows = sorted(rows, key=lambda row: row[1]["top1"])[:10]
        title = f"10 of {len(classes)} classes with the lowest recall (--out writes all)"
    print_table(
        ("class", ">images", ">recall %", ">precision %", ">F1 %", "most confused with"),
        [
            (
                name,
                str(entry["images"]),
                *("-" if entry[key] is None else f"{entry[key]:.1f}" for key in ("top1", "precision", "f1")),
                _confusion(entry),
            )
            for name, entry in rows
        ],
        title=title,
    )
    print_text()


def _confusion(entry: dict[str, Any]) -> str:
    other = entry.get("confused_with")
    return "" if other is None else f"{other} ({entry['confused_images']})"


def _print_scores(report: dict[str, Any]) -> None:
    size, speed = report["preprocessing"]["input_size"], report["throughput"]
    weights = f" ({report['weights']} weights)" if report["weights"] else ""
    optional = [
        ("top-5", report["top5"], "{:.2f} %"),
        ("loss", report["loss"], "{:.4f}"),
        ("macro recall", report["macro_recall"], "{:.2f} %"),
        ("macro precision", report["macro_precision"], "{:.2f} %"),
        ("macro F1", report["macro_f1"], "{:.2f} %"),
        (
            "baseline",
            report["majority_baseline"],
            "{:.2f} % top-1 by always predicting the most frequent class",
        ),
    ]
    print_pairs(
        [
            ("model", f"{report['model']}{weights}, {size[1]}x{size[2]} px"),
            ("images", f"{report['images']} ({report['split']}), {len(report['skipped'])} skipped"),
            ("top-1", f"{report['top1']:.2f} %"),
            *[(name, form.format(value)) for name, value, form in optional if value is not None],
            (
                "speed",
                f"{speed['images_per_second']:.1f} images/s, {speed['model_images_per_second']:.1f} without "
                f"data loading; {report['device']}, {report['threads']} threads",
            ),
        ]
    )
