"""Measure on this machine: `lightspine bench MODELS`, `bench ops` the scans, `bench export` ONNX files.

Keep the machine idle meanwhile: what is compared takes turns, but a busy processor still blurs it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lightspine_cli import _bench_models
from lightspine_cli._output import print_json

PARTS = ("time", "memory", "models")
KINDS = ("ops", "export")

# Models and kinds stand in the same place, which one parser of the standard library cannot tell apart.
PASSES_ARGUMENTS_THROUGH = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command, and below `ops` and `export` those of these kinds."""
    _bench_models.add_options(parser)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="ops|export")
    ops = kinds.add_parser(
        "ops",
        help="the selective scan and the four-direction scan on the CPU",
        description="Time, memory and share of the scans, next to what bounds them.",
        allow_abbrev=False,
    )
    ops.add_argument(
        "--shapes",
        type=_names,
        metavar="A,B,C",
        help="out of vmamba-1 to vmamba-4, vim-197, vim-1025, vim-6085 (default: all)",
    )
    ops.add_argument("--batch", type=_numbers, default=[1, 8], metavar="1,8", help="batches (default: 1,8)")
    ops.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    ops.add_argument("--repeats", type=int, default=15, help="timed calls of each (default: %(default)s)")
    ops.add_argument(
        "--parts", type=_names, default=list(PARTS), metavar="A,B", help=f"out of {', '.join(PARTS)}"
    )
    ops.add_argument("--json", action="store_true", help="print one object with all numbers")
    _add_export(kinds)


def _add_export(kinds: Any) -> None:
    export = kinds.add_parser(
        "export",
        help="exported models in ONNX Runtime, beside PyTorch and timm's",
        description="Models with random weights: eager, optimised, as ONNX, and timm's own as ONNX.",
        allow_abbrev=False,
    )
    export.add_argument(
        "--models", type=_names, metavar="A,B", help="registered names (default: the smallest of each family)"
    )
    export.add_argument(
        "--batch", type=_numbers, default=[1, 8], metavar="1,8", help="batches (default: 1,8)"
    )
    export.add_argument("--threads", type=int, default=2, help="of both (default: %(default)s)")
    export.add_argument("--repeats", type=int, default=15, help="timed calls of each (default: %(default)s)")
    export.add_argument("--out", type=Path, metavar="FILE", help="write all numbers as JSON")
    export.add_argument("--json", action="store_true", help="print one object with all numbers")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Returns:
        0 for the scans and exported files, whether or not their targets are met; 1 if a model could not be
        measured.
    """
    from lightspine_cli.main import SentenceParser

    parser = SentenceParser(
        prog="lightspine bench", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if args.arguments and args.arguments[0] in KINDS:
        add_arguments(parser)
        chosen = parser.parse_args(args.arguments, argparse.Namespace(arguments=args.arguments))
        return _run_export(chosen) if chosen.kind == "export" else _run_ops(chosen)
    _bench_models.add_arguments(parser)
    return _bench_models.run(parser.parse_args(args.arguments), args.arguments)


def _run_export(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from lightspine.benchmark.export_speed import SMALL_MODELS, measure_export
    from lightspine.export.onnx_file import check_writable
    from lightspine.utils.files import atomic_write

    if args.out is not None:
        check_writable(args.out)
    names = args.models or list(SMALL_MODELS)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=len(names))
        report = measure_export(
            names,
            args.batch,
            threads=args.threads,
            repeats=args.repeats,
            on_step=lambda text: progress.update(task, advance=1, description=f"{text}: done"),
        )
    if args.out is not None:
        with atomic_write(args.out) as file:
            file.write(json.dumps(report.as_dict(), indent=2).encode())
    if args.json:
        print_json(report.as_dict())
        return 0
    from lightspine_cli._bench_export_output import print_export

    print_export(report)
    return 0


def _run_ops(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from lightspine.benchmark.ops import count_steps, measure_ops
    from lightspine.benchmark.ops_cases import CASES, find_cases

    cases = list(CASES) if args.shapes is None else find_cases(args.shapes)
    # The standard output holds nothing but the result.
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=count_steps(cases, args.batch, args.parts))
        report = measure_ops(
            cases,
            args.batch,
            threads=args.threads,
            repeats=args.repeats,
            parts=args.parts,
            on_step=lambda text: progress.update(task, advance=1, description=f"{text}: done"),
        )
    if args.json:
        print_json(report.as_dict())
        return 0
    from lightspine_cli._bench_output import print_ops

    print_ops(report)
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[Any]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,8, got {text!r}") from None
