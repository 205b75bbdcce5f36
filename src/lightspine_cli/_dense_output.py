"""Run and print `evaluate` and `predict` for detectors and segmenters."""

import argparse
import shlex
from typing import Any

from lightspine_cli._inference_options import preprocessing_arguments
from lightspine_cli._output import print_json, print_pairs, print_table, print_text

MAX_CLASS_ROWS = 50
"""With more classes, only the 10 with the lowest scores are printed."""


def evaluate_dense(args: argparse.Namespace, task: str, checkpoint: Any) -> int:
    """Evaluate a detector or segmenter, print the metrics and, with --out, write the report."""
    from lightspine.evaluation import evaluate_detector, evaluate_segmenter, write_dense_report

    shared = {
        "weights": preprocessing_arguments(args)["weights"],
        "split": args.split,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "num_workers": args.workers,
        "device": args.device,
        "progress": True,
    }
    if task == "detector":
        report = evaluate_detector(
            checkpoint,
            args.data,
            images=args.images,
            **_detector_arguments(args),
            # Detectors take much larger images than classifiers, whose default is 64.
            batch_size=1 if args.batch_size is None else args.batch_size,
            results=None if args.out is None else args.out / "detections.json",
            **shared,
        )
    else:
        report = evaluate_segmenter(
            checkpoint,
            args.data,
            **_segmenter_arguments(args),
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
        print_text(f"wrote {path}")
    for problem in report.get("problems", []):
        print_text(f"annotation problem: {problem}")
    for reason in report["skipped"].values():
        print_text(f"skipped: {reason}")
    return 0


def predict_dense_files(args: argparse.Namespace, checkpoint: Any) -> int:
    """Predict objects or class maps, print them and, with --out, draw them."""
    from lightspine.errors import UsageError
    from lightspine.evaluation import predict_dense
    from lightspine.evaluation.predictors import DEFAULT_SCORE_THRESHOLD
    from lightspine.utils.image_files import expand_image_paths

    if not args.images:
        raise UsageError("expected image files or folders")
    files = expand_image_paths(args.images)
    # An unreadable file named by the user is an error; in a folder it is skipped.
    skipped: dict[str, str] | None = {} if any(path.is_dir() for path in args.images) else None
    found = predict_dense(
        checkpoint,
        files,
        weights=preprocessing_arguments(args)["weights"],
        out=args.out,
        labels=args.labels,
        coco=args.coco,
        max_drawn=args.max_drawn,
        **_detector_arguments(args),
        **_segmenter_arguments(args),
        skipped=skipped,
        device=args.device,
        progress=True,
    )
    if args.json:
        print_json([_as_object(prediction) for prediction in found])
        return 0
    print_table(("image", "found", "picture"), [_row(prediction) for prediction in found])
    if found and all(prediction.objects == [] for prediction in found):
        threshold = DEFAULT_SCORE_THRESHOLD if args.score_threshold is None else args.score_threshold
        print_text(
            f"no object has a score of at least {threshold:g}: `lightspine evaluate` prints a good "
            "--score-threshold for each class"
        )
    for reason in (skipped or {}).values():
        print_text(f"skipped: {reason}")
    return 0


def _detector_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "resize": _pair(args.resize),
        "score_threshold": args.score_threshold,
        "detections_per_image": args.detections_per_image,
    }


def _segmenter_arguments(args: argparse.Namespace) -> dict[str, Any]:
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
        best = {name: report["best_f1"][name]["box"] for name in classes}
        rows = [
            (name, *(_percent(entry[kind]) for kind in kinds), *_best_f1(best[name]))
            for name, entry in classes.items()
        ]
        columns: tuple[str, ...] = (
            "class",
            *(f">{kind} AP %" for kind in kinds),
            *(">precision %", ">recall %", ">best F1 %", ">at score"),
        )
    else:
        kinds = ["IoU", "accuracy", "precision", "F1"]
        rows = [(row["name"], *(_percent(row[kind]) for kind in kinds)) for row in classes]
        columns = ("class", *(f">{kind} %" for kind in kinds))
    seen = [row for row in rows if any(value != "-" for value in row[1:])]
    title = None
    if len(seen) > MAX_CLASS_ROWS:
        seen = sorted(seen, key=lambda row: float(row[1]) if row[1] != "-" else 0.0)[:10]
        title = f"10 of {len(classes)} classes with the lowest scores (--out writes all)"
    print_table(columns, seen, title=title)
    print_text()


def _print_scores(report: dict[str, Any]) -> None:
    speed = report["throughput"]
    weights = f" ({report['weights']} weights)" if report["weights"] else ""
    pairs = [
        ("network", f"{report['head']} over {report['model']}{weights}"),
        ("images", f"{report['images']} ({report['split']}), {len(report['skipped'])} skipped"),
    ]
    for name, value in report["scores"].items():
        if isinstance(value, dict):
            numbers = ", ".join(f"{key} {_percent(number)}" for key, number in value.items())
            pairs.append((f"{name} %", numbers))
        else:
            pairs.append((name, f"{value:.2f} %"))
    if baseline := report.get("majority_baseline"):
        scores = f"mIoU {baseline['mIoU']:.2f} %, aAcc {baseline['aAcc']:.2f} %"
        pairs.append(("baseline", f"{scores} by always predicting {baseline['class']}"))
    memory = "" if speed["peak_mib"] is None else f", {speed['peak_mib']:.0f} MiB peak memory"
    pairs.append(
        (
            "speed",
            f"{speed['images_per_second']:.2f} images/s, {speed['reading_share']:.0%} data loading; "
            f"{report['device']}, {report['threads']} threads{memory}",
        )
    )
    print_pairs(pairs)


def _best_f1(point: dict[str, float] | None) -> tuple[str, ...]:
    """Format the box precision, recall and F1 at the score threshold of the highest F1."""
    if point is None:
        return ("-", "-", "-", "-")
    return (*(_percent(point[name]) for name in ("precision", "recall", "F1")), f"{point['score']:.2f}")


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
