"""The options that commands share: which checkpoint, how images are prepared, how a run over many is done."""

import argparse
from pathlib import Path
from typing import Any

# As the library calls them: there "model" is also the name of the entry in official files.
_WEIGHTS = {"auto": "auto", "raw": "model", "ema": "ema"}
_CHECKPOINT_ENDINGS = {".onnx", ".safetensors", ".pth", ".pt", ".ckpt"}


def add_preparation(parser: argparse.ArgumentParser) -> None:
    """Declare how a checkpoint is read and its images prepared."""
    parser.add_argument(
        "--weights",
        choices=tuple(_WEIGHTS),
        default="auto",
        help="of a file that has both: as trained, their average, or those whose score is published (auto)",
    )
    parser.add_argument(
        "--image-size", "--size", type=int, metavar="PX", help="instead of the checkpoint's own"
    )
    parser.add_argument(
        "--crop-pct", type=float, help="side of the central crop as a share of the resized shorter side"
    )
    parser.add_argument(
        "--crop-mode", choices=("center", "squash", "border"), help="squash: both sides alike, ratio lost"
    )


def take_checkpoint(args: argparse.Namespace, files: list[Path]) -> list[Path]:
    """Let the first of some files be the checkpoint, where its name ends as a checkpoint's; return the rest.

    Raises:
        UsageError: no checkpoint, or one more than `--checkpoint` names.
    """
    from lightspine.errors import UsageError

    first = files[0] if files and files[0].suffix.lower() in _CHECKPOINT_ENDINGS else None
    if first is None and args.checkpoint is None:
        raise UsageError(
            "expected a checkpoint: an .onnx or .safetensors file as first argument, or --checkpoint"
        )
    if first is None:
        return files
    if args.checkpoint is not None:
        raise UsageError(f"expected one checkpoint, got {first} and --checkpoint {args.checkpoint}")
    args.checkpoint = first
    return files[1:]


def add_bulk(parser: argparse.ArgumentParser, formats: tuple[str, ...]) -> None:
    """Declare how a run over many images is done."""
    bulk = parser.add_argument_group("runs over many images")
    bulk.add_argument(
        "--data",
        metavar="FOLDER|SHARDS",
        help="images at any depth, or .tar shards such as 'a-{000..012}.tar'",
    )
    bulk.add_argument("--out", type=Path, metavar="DIR", help="a new folder for what comes out")
    bulk.add_argument(
        "--format",
        choices=formats,
        default=formats[0],
        help="parquet needs lightspine[parquet] (default: %(default)s)",
    )
    bulk.add_argument("--resume", action="store_true", help="go on with what a killed run left in --out")
    bulk.add_argument(
        "--devices", type=int, default=1, metavar="N", help="processes, a device each (default: %(default)s)"
    )
    bulk.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    bulk.add_argument(
        "--workers", type=int, default=0, help="processes that read, per device (default: %(default)s)"
    )
    bulk.add_argument(
        "--part-size", type=int, default=1024, help="images between two files (default: %(default)s)"
    )


def preparation(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the library for what `add_preparation` declared."""
    return {
        "weights": _WEIGHTS[args.weights],
        "image_size": args.image_size,
        "crop_pct": args.crop_pct,
        "crop_mode": args.crop_mode,
    }


def bulk_options(args: argparse.Namespace, checkpoint: Path | None) -> Any:
    """Return the `InferenceOptions` of a command line."""
    import sys

    from lightspine.evaluation import InferenceOptions

    return InferenceOptions(
        checkpoint=checkpoint,
        batch_size=args.batch_size,
        part_size=args.part_size,
        num_workers=args.workers,
        device=args.device,
        devices=args.devices,
        resume=args.resume,
        progress=sys.stderr.isatty(),
        **preparation(args),
    )


def print_run(outcome: dict[str, Any], args: argparse.Namespace, rows: str) -> None:
    """Tell what a run over many images left behind."""
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
