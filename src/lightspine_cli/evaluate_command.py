"""Score a checkpoint on a folder of images (its `val` folder where it has one) or on the held-out digits."""

import argparse
from pathlib import Path

from lightspine_cli._output import print_facts, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lightspine evaluate`."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="weights: ours, an official file or timm's"
    )
    parser.add_argument(
        "--data", required=True, metavar="FOLDER|digits", help="CLASS/* or val/CLASS/*, or digits"
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name, for a file that does not tell")
    parser.add_argument(
        "--val-fraction", type=float, help="score only the share of each class that training held out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the held-out share (default: %(default)s)")
    parser.add_argument("--size", type=int, help="image size in pixels instead of the checkpoint's own")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read images (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch's name of the device (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="report.json", help="also write the whole report to a file"
    )
    parser.add_argument("--json", action="store_true", help="print the whole report")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the scores and write the report if asked for."""
    import sys

    from lightspine.evaluation import evaluate, write_report

    report = evaluate(
        args.model or args.checkpoint,
        args.data,
        checkpoint=args.checkpoint if args.model else None,
        val_fraction=args.val_fraction,
        seed=args.seed,
        image_size=args.size,
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=args.device,
        # The bar goes to the standard output, which must hold nothing but the JSON.
        progress=sys.stdout.isatty() and not args.json,
    )
    if args.out is not None:
        write_report(report, args.out)
    if args.json:
        print_json(report)
        return 0
    print_table(
        ("class", ">images", ">top-1 %"),
        [
            (name, str(entry["images"]), "-" if entry["top1"] is None else f"{entry['top1']:.1f}")
            for name, entry in report["classes"].items()
        ],
    )
    print()
    print_facts(
        [
            ("model", report["model"]),
            ("images", f"{report['images']} ({report['split']}), {len(report['skipped'])} skipped"),
            ("top-1", f"{report['top1']:.2f} %"),
            *([] if report["top5"] is None else [("top-5", f"{report['top5']:.2f} %")]),
            ("loss", f"{report['loss']:.4f}"),
            *([("report", str(args.out))] if args.out else []),
        ]
    )
    for reason in report["skipped"].values():
        print(f"skipped: {reason}")
    return 0
