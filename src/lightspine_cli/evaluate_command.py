"""Score a checkpoint on labelled images: folders, shards, digits, COCO files, or images with label maps."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from lightspine_cli._dense_options import EVALUATE, add_evaluation, detect_task, reject_inapplicable_options
from lightspine_cli._dense_output import evaluate_dense
from lightspine_cli._inference_arguments import add_preparation, preparation, take_checkpoint
from lightspine_cli._output import print_json, print_pairs, print_table

_SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine evaluate`."""
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="a checkpoint or an exported .onnx file, unless --checkpoint names it",
    )
    parser.add_argument("--checkpoint", type=Path, help="weights: ours, an official file or timm's")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER|FILE|digits",
        help="CLASS/*, val/CLASS/*, ImageNet's flat val, .tar shards, or digits; for a detector a COCO file "
        "or folder; for a segmenter images/val and annotations/val, or COCO's",
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name, for a file that does not tell")
    parser.add_argument(
        "--val-fraction", type=float, help="score only the share of each class that training held out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the held-out share (default: %(default)s)")
    parser.add_argument(
        "--class-mapping",
        metavar="FILE|imagenet",
        help="which classes the folders or images mean, such as ReaL's real.json; imagenet: WordNet ids or "
        "class numbers as folders, the model choosing among those only (ImageNet-A, -R)",
    )
    add_preparation(parser)
    parser.add_argument("--batch-size", type=int, help="images at a time (default: 64, of a detector 1)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read images (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch's name of the device (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write report.json, classes.csv and confusion.png"
    )
    add_evaluation(parser)
    parser.add_argument("--json", action="store_true", help="print the whole report")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the scores and write the report if asked for."""
    import sys

    from lightspine.errors import UsageError
    from lightspine.evaluation import evaluate, write_report

    if args.out is not None and (args.out.suffix == ".json" or args.out.is_file()):
        raise UsageError(f"expected a folder for --out, got {args.out}")
    if take_checkpoint(args, [args.file] if args.file is not None else []):
        raise UsageError(f"expected a checkpoint as the only argument without an option, got {args.file}")
    kind = detect_task(args)
    reject_inapplicable_options(args, kind, EVALUATE)
    if kind != "classifier":
        return evaluate_dense(args, kind)
    report = evaluate(
        args.model or args.checkpoint,
        args.data,
        checkpoint=args.checkpoint if args.model else None,
        val_fraction=args.val_fraction,
        seed=args.seed,
        class_mapping=args.class_mapping,
        batch_size=64 if args.batch_size is None else args.batch_size,
        num_workers=args.workers,
        device=args.device,
        progress=sys.stderr.isatty(),
        **preparation(args),
    )
    report["command"] = shlex.join(["lightspine", "evaluate", *args.arguments])
    written = write_report(report, args.out) if args.out is not None else {}
    if args.json:
        print_json(report)
        return 0
    _print_classes(report["classes"])
    _print_scores(report)
    for path in written.values():
        print(f"wrote {path}")
    for reason in report["skipped"].values():
        print(f"skipped: {reason}")
    return 0


def _print_classes(classes: dict[str, dict[str, Any]] | None) -> None:
    """Print all classes, or of very many the weakest."""
    if classes is None:
        return
    rows = [(name, entry) for name, entry in classes.items() if entry["images"] or len(classes) <= _SHOWN]
    title = None
    if len(rows) > _SHOWN:
        rows = sorted(rows, key=lambda row: row[1]["top1"])[:10]
        title = f"the 10 weakest of {len(classes)} classes (--out writes all)"
    print_table(
        ("class", ">images", ">top-1 %", "most often taken for"),
        [
            (
                name,
                str(entry["images"]),
                "-" if entry["top1"] is None else f"{entry['top1']:.1f}",
                _confusion(entry),
            )
            for name, entry in rows
        ],
        title=title,
    )
    print()


def _confusion(entry: dict[str, Any]) -> str:
    other = entry.get("confused_with")
    return "" if other is None else f"{other} ({entry['confused_images']})"


def _print_scores(report: dict[str, Any]) -> None:
    size, speed = report["preprocessing"]["input_size"], report["throughput"]
    weights = f" ({report['weights']} weights)" if report["weights"] else ""
    optional = [
        ("top-5", report["top5"], "{:.2f} %"),
        ("loss", report["loss"], "{:.4f}"),
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
                f"reading them; {report['device']}, {report['threads']} threads",
            ),
        ]
    )
