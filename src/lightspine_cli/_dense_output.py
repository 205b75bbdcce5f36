"""What `evaluate` and `predict` do with a detector or segmenter, and print."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from lightspine_cli._output import print_json, print_pairs, print_table

_SHOWN = 50


def evaluate_dense(args: argparse.Namespace, kind: str) -> int:
    """Score a detector or segmenter, print the scores and write the report if asked for."""
    from lightspine.evaluation import evaluate_detector, evaluate_segmenter, write_dense_report

    shared = {
        "split": args.split,
        "num_workers": args.workers,
        "device": args.device,
        "progress": sys.stderr.isatty(),
    }
    if kind == "detector":
        report = evaluate_detector(
            args.checkpoint,
            args.data,
            images=args.images,
            **_detector_test(args),
            # The usual 64 of classifiers are too many images of a thousand pixels.
            batch_size=1 if args.batch_size is None else args.batch_size,
            results=None if args.out is None else args.out / "detections.json",
            **shared,
        )
    else:
        report = evaluate_segmenter(
            args.checkpoint,
            args.data,
            val_fraction=0.2 if args.val_fraction is None else args.val_fraction,
            seed=args.seed,
            **_segmenter_test(args),
            **shared,
        )
    report["command"] = shlex.join(["lightspine", "evaluate", *args.arguments])
    written = write_dense_report(report, args.out) if args.out is not None else {}
    if args.json:
        print_json(report)
        return 0
    _print_classes(report)
    _print_scores(report)
    for path in written.values():
        print(f"wrote {path}")
    for problem in report.get("problems", []):
        print(f"left out or mended: {problem}")
    for reason in report["skipped"].values():
        print(f"skipped: {reason}")
    return 0


def predict_dense_files(args: argparse.Namespace) -> int:
    """Find objects or classes of pixels, print them and draw them if asked for."""
    from lightspine.errors import UsageError
    from lightspine.evaluation import predict_dense
    from lightspine.utils.image_files import list_image_files

    if not args.images:
        raise UsageError("expected image files or folders")
    files: list[Path] = []
    for path in args.images:
        inside = list_image_files(path) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"expected images in the folder {path}, found none")
        files += inside
    # A file that is named has to be an image; of a folder's the rest goes on.
    skipped: dict[str, str] | None = {} if any(path.is_dir() for path in args.images) else None
    found = predict_dense(
        args.checkpoint,
        files,
        out=args.out,
        labels=args.labels,
        coco=args.coco,
        **_detector_test(args),
        **_segmenter_test(args),
        skipped=skipped,
        device=args.device,
        progress=sys.stderr.isatty(),
    )
    if args.json:
        print_json([_as_object(prediction) for prediction in found])
        return 0
    print_table(("image", "found", "picture"), [_row(prediction) for prediction in found])
    for reason in (skipped or {}).values():
        print(f"skipped: {reason}")
    return 0


def _detector_test(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "resize": _pair(args.resize),
        "score_threshold": args.score_threshold,
        "detections_per_image": args.detections_per_image,
    }


def _segmenter_test(args: argparse.Namespace) -> dict[str, Any]:
    from lightspine.errors import UsageError
    from lightspine.evaluation.segmentation import MULTI_SCALE

    if args.multi_scale and args.ratios is not None:
        raise UsageError("expected either --multi-scale or --ratios, got both")
    return {
        "scale": _pair(args.scale),
        "own_size": args.own_size,
        "window": _pair(args.window),
        "stride": _pair(args.stride),
        "ratios": MULTI_SCALE if args.multi_scale else args.ratios,
        "flip": args.flip or args.multi_scale,
    }


def _pair(values: list[int] | None) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])


def _print_classes(report: dict[str, Any]) -> None:
    classes = report["classes"]
    if isinstance(classes, dict):
        kinds = list(report["scores"])
        rows = [(name, *(_percent(entry[kind]) for kind in kinds)) for name, entry in classes.items()]
        columns: tuple[str, ...] = ("class", *(f">{kind} AP %" for kind in kinds))
    else:
        rows = [(row["name"], _percent(row["IoU"]), _percent(row["accuracy"])) for row in classes]
        columns = ("class", ">IoU %", ">accuracy %")
    seen = [row for row in rows if any(value != "-" for value in row[1:])]
    title = None
    if len(seen) > _SHOWN:
        seen = sorted(seen, key=lambda row: float(row[1]) if row[1] != "-" else 0.0)[:10]
        title = f"the 10 weakest of {len(classes)} classes (--out writes all)"
    print_table(columns, seen, title=title)
    print()


def _print_scores(report: dict[str, Any]) -> None:
    speed = report["throughput"]
    facts = [
        ("network", f"{report['head']} over {report['model']}"),
        ("images", f"{report['images']}, {len(report['skipped'])} skipped"),
    ]
    for name, value in report["scores"].items():
        if isinstance(value, dict):
            numbers = ", ".join(f"{key} {_percent(number)}" for key, number in value.items())
            facts.append((f"{name} %", numbers))
        else:
            facts.append((name, f"{value:.2f} %"))
    memory = "" if speed["peak_mib"] is None else f", {speed['peak_mib']:.0f} MiB at most"
    facts.append(
        (
            "speed",
            f"{speed['images_per_second']:.2f} images/s, {speed['reading_share']:.0%} of it reading; "
            f"{report['device']}, {report['threads']} threads{memory}",
        )
    )
    print_pairs(facts)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _as_object(prediction: Any) -> dict[str, Any]:
    found = {"objects": prediction.objects} if prediction.shares is None else {"shares": prediction.shares}
    picture = None if prediction.picture is None else str(prediction.picture)
    return {"image": str(prediction.path), **found, "picture": picture}


def _row(prediction: Any) -> tuple[str, str, str]:
    if prediction.shares is not None:
        parts = [f"{name} {share:.0%}" for name, share in list(prediction.shares.items())[:4]]
    else:
        counts: dict[str, int] = {}
        for entry in prediction.objects:
            counts[entry["name"]] = counts.get(entry["name"], 0) + 1
        parts = [f"{count} x {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])[:6]]
    picture = "" if prediction.picture is None else str(prediction.picture)
    return str(prediction.path), ", ".join(parts) or "nothing", picture
