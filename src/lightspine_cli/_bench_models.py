"""`lightspine bench MODELS` and `lightspine bench --preset NAME`: whole models, measured in turns."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lightspine_cli._output import print_json

_DESCRIPTION = """\
Measure whole models side by side on this machine: ours, and timm's as timm/NAME. The models take turns.

`lightspine bench ops` measures the scans, `lightspine bench export` exported files (see their --help)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the models and the options."""
    parser.description = _DESCRIPTION
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a name of ours, or timm/NAME")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those that a preset sets have no default here."""
    parser.add_argument("--preset", metavar="NAME", help="the models and settings of a paper's table")
    parser.add_argument("--list-presets", action="store_true", help="list the presets and stop")
    parser.add_argument("--batch", type=_numbers, metavar="1,8", help="images at a time (default: 1)")
    parser.add_argument(
        "--size", type=_sizes, metavar="224,448x672", help="pixels, or HxW (default: each model's own)"
    )
    parser.add_argument(
        "--mode", type=_names, metavar="A,B", help="out of eager, optimized, compile, onnx (default: eager)"
    )
    parser.add_argument(
        "--dtype", type=_names, metavar="A,B", help="out of float32, bfloat16, float16 (default: float32)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="of torch and of ONNX Runtime (default: 2)")
    parser.add_argument("--train", action="store_true", default=None, help="measure a training step too")
    parser.add_argument("--repeats", type=int, help="timed calls of each row (default: 15)")
    parser.add_argument("--warmup", type=int, help="untimed calls of each row (default: 2)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="a row that has spent so much in three timed calls or more sits the rest out (default: 10)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write results.json and results.csv after each group"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder of --out")
    parser.add_argument("--json", action="store_true", help="print one object with all numbers")


def run(args: argparse.Namespace, arguments: list[str]) -> int:
    """Measure and print.

    Args:
        args: parsed.
        arguments: as they were given, to repeat the run with.

    Returns:
        1 if a model failed or had too little memory, else 0.
    """
    if args.list_presets:
        from lightspine.benchmark.presets import list_presets
        from lightspine_cli._bench_models_output import print_presets

        print_presets(list_presets())
        return 0
    result = _measure(args, arguments)
    if args.json:
        print_json(result.as_dict())
    else:
        from lightspine_cli._bench_models_output import print_result

        print_result(result)
    return int(any(row.status in ("failed", "out_of_memory") for row in result.rows))


def _measure(args: argparse.Namespace, arguments: list[str]) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lightspine.benchmark.models.run import Destination, bench_models
    from lightspine.benchmark.models.settings import BenchSettings

    specs, preset_settings = _models(args)
    given = {
        "batches": args.batch,
        "sizes": args.size,
        "modes": args.mode,
        "dtypes": args.dtype,
        "device": args.device,
        "threads": args.threads,
        "train": args.train,
        "repeats": args.repeats,
        "warmup": args.warmup,
        "budget_s": args.budget,
    }
    settings = BenchSettings(
        **preset_settings | {name: value for name, value in given.items() if value is not None}
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        # The standard output holds nothing but the result.
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("starting", total=None)
        return bench_models(
            specs,
            settings,
            Destination(
                folder=args.out,
                resume=args.resume,
                # To be repeated, and not resumed.
                command=("lightspine", "bench", *(word for word in arguments if word != "--resume")),
                preset=args.preset,
            ),
            on_plan=lambda total: progress.update(task, total=total),
            on_step=lambda text, steps: progress.update(task, advance=steps, description=text),
        )


def _models(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    from lightspine.benchmark.models.specs import parse_model
    from lightspine.benchmark.presets.catalogue import find_preset, with_published
    from lightspine.errors import UsageError

    if args.preset is None and not args.models:
        raise UsageError(
            "expected models, --preset, --list-presets, ops or export (see `lightspine bench --help`)"
        )
    specs: list[Any] = []
    settings: dict[str, Any] = {}
    if args.preset is not None:
        preset = find_preset(args.preset)
        specs, settings = list(preset.specs), preset.settings
    # More models beside a preset's are measured with its settings.
    more = [with_published(parse_model(name)) for name in dict.fromkeys(args.models)]
    return specs + [spec for spec in more if spec not in specs], settings


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,8, got {text!r}") from None


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for size in text.split(","):
        sides = size.split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise argparse.ArgumentTypeError(f"expected sizes such as 224,448x672, got {text!r}")
        sizes.append((int(sides[0]), int(sides[-1])))
    return tuple(dict.fromkeys(sizes))
