"""Benchmark models (`lightspine bench MODEL ...`), the scan operators (`ops`) or data loading (`data`)."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightspine_cli._output import print_json, warn

PARTS = ("time", "memory", "models")
_EXPORT_MODELS = (
    "shvit_s1",
    "timm/shvit_s1",
    "efficientvim_m1",
    "timm/efficientvim_m1",
    "efficientmod_xxs",
    "vim_tiny",
    "vmamba_tiny",
)

# argparse cannot have model names and subcommands at the same position.
PASSES_ARGUMENTS_THROUGH = True

_DESCRIPTION = """\
Benchmark latency, memory and multiply-adds of models of lightspine (NAME) and timm (timm/NAME), and of
checkpoints (a file, or published weights as NAME.TAG). The calls of all models are interleaved. Keep the
machine otherwise idle.

`lightspine bench ops` benchmarks the scan operators, `lightspine bench data FOLDER` how fast the images of a
folder are loaded (see their --help)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine bench` and the subcommands `ops`, `data` and `export`."""
    _add_model_options(parser)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="ops|data")
    _add_ops_options(
        kinds.add_parser(
            "ops",
            help="the selective scan and the cross scan",
            description="Measure time and memory of the scan operators: on the CPU beside the same scans in "
            "plain PyTorch, on a CUDA device beside the time of copying their inputs and outputs and of "
            "computing their exponentials.",
            allow_abbrev=False,
        )
    )
    _add_data_options(
        kinds.add_parser(
            "data",
            help="the loading of an image folder",
            description="Measure how many images per second and core the trainer reads from an image folder: "
            "decoding alone, and batches with augmentation. With fewer images per second than the training "
            "step takes, the device waits for data.",
            allow_abbrev=False,
        )
    )
    _add_export_options(
        kinds.add_parser(
            "export",
            description="Deprecated: use `lightspine bench MODEL ... --mode eager,optimized,onnx`.",
            allow_abbrev=False,
        )
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Returns:
        1 if a model failed or ran out of memory, else 0.
    """
    from lightspine_cli.main import SentenceParser

    parser = SentenceParser(
        prog="lightspine bench", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = {"ops": _run_ops, "data": _run_data, "export": _run_export}
    if args.arguments and args.arguments[0] in kinds:
        add_arguments(parser)
        chosen = parser.parse_args(args.arguments)
        return kinds[chosen.kind](chosen)
    parser.description = _DESCRIPTION
    parser.add_argument("models", nargs="*", metavar="MODEL", help="NAME, timm/NAME, NAME.TAG or a file")
    _add_model_options(parser)
    return _run_models(parser.parse_args(args.arguments), args.arguments)


def parse_size(text: str) -> tuple[int, int]:
    """Parse an image size such as `224` or `448x672` (height x width); a type for argparse."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"expected a size such as 224 or 448x672, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(dict.fromkeys(parse_size(size) for size in text.split(",")))


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _parse_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,8, got {text!r}") from None


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    # Options that a preset may set have no default here; `BenchSettings` has the defaults.
    parser.add_argument("--preset", metavar="NAME", help="the models and settings of a paper's table")
    parser.add_argument(
        "--only",
        type=_parse_names,
        metavar="A,B",
        help="of the preset's models measure these, as named in the preset (NAME or timm/NAME)",
    )
    parser.add_argument("--list-presets", action="store_true", help="list the presets and exit")
    parser.add_argument("--batch", type=_parse_numbers, metavar="1,8", help="batch sizes (default: 1)")
    parser.add_argument(
        "--size",
        type=_parse_sizes,
        metavar="224,448x672",
        help="image sizes in pixels, or HxW (default: each model's evaluation size)",
    )
    parser.add_argument(
        "--mode",
        type=_parse_names,
        metavar="A,B",
        help="eager, optimized, compile, onnx, runtime (default: eager)",
    )
    parser.add_argument(
        "--dtype", type=_parse_names, metavar="A,B", help="float32, bfloat16, float16 (default: float32)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--threads", type=int, help="threads of torch and ONNX Runtime (default: OMP_NUM_THREADS, or 2)"
    )
    parser.add_argument(
        "--train", action=argparse.BooleanOptionalAction, help="also measure a training step (default: no)"
    )
    parser.add_argument("--repeats", type=int, help="timed calls of each row (default: 15)")
    parser.add_argument("--warmup", type=int, help="untimed calls of each row (default: 2)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="stop timing a row after this time in three or more calls (default: 10)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results.json and results.csv here")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder of --out")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_ops_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=_parse_names,
        metavar="A,B,C",
        help="vmamba-1 to vmamba-4, vim-197, vim-1025, vim-6085 (default: all)",
    )
    parser.add_argument(
        "--batch",
        type=_parse_numbers,
        metavar="1,8",
        help="batch sizes (default: 1,8; on cuda 128,1 for the shapes of VMamba, and 128, 16 and 8,1 for the "
        "three of Vim)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        type=_parse_names,
        metavar="A,B",
        help="on cuda: float32, bfloat16, float16 (default: bfloat16); on cpu float32 only",
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: OMP_NUM_THREADS, or 2)")
    parser.add_argument(
        "--repeats", type=int, default=15, help="timed calls of each function (default: %(default)s)"
    )
    parser.add_argument(
        "--parts",
        type=_parse_names,
        metavar="A,B",
        help=f"any of {', '.join(PARTS)} (default: all); on cuda time and memory only",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="train/CLASS/* and val/CLASS/*, or CLASS/*")
    parser.add_argument("--size", type=int, default=224, help="side in pixels (default: %(default)s)")
    parser.add_argument(
        "--augmentation",
        default="medium",
        metavar="NAME",
        help="none, light, medium or strong (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=_parse_numbers,
        default=(0, 2),
        metavar="0,2",
        help="worker processes (default: 0,2)",
    )
    parser.add_argument("--batch", type=int, default=64, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=1000, help="images of each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--decode",
        default="cpu",
        choices=("cpu", "cuda"),
        help="decode and augment in the workers or on the GPU (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=_parse_names, metavar="A,B")
    parser.add_argument("--batch", default="1,8", metavar="1,8")
    parser.add_argument("--threads")
    parser.add_argument("--repeats", default="15")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true")


def _run_export(args: argparse.Namespace) -> int:
    """Run the model benchmark in place of the deprecated `bench export`."""
    models = args.models or _EXPORT_MODELS
    arguments = [*models, "--mode", "eager,optimized,onnx", "--batch", args.batch]
    arguments += ["--repeats", args.repeats]
    if args.threads is not None:
        arguments += ["--threads", args.threads]
    if args.out is not None:
        # The option used to take a file.
        arguments += ["--out", str(args.out.with_suffix(""))]
    if args.json:
        arguments.append("--json")
    warnings.warn(
        f"`lightspine bench export` is deprecated, use `lightspine bench {' '.join(arguments)}`",
        FutureWarning,
        stacklevel=2,
    )
    return run(argparse.Namespace(arguments=arguments))


def _run_models(args: argparse.Namespace, arguments: list[str]) -> int:
    if args.list_presets:
        from lightspine.benchmark.presets import list_presets
        from lightspine_cli._bench_output import print_presets

        print_presets(list_presets())
        return 0
    result = _measure_models(args, arguments)
    if args.json:
        print_json(result.as_dict())
    else:
        from lightspine_cli._bench_output import print_models

        print_models(result)
    return int(any(row.status in ("failed", "out_of_memory") for row in result.rows))


def _measure_models(args: argparse.Namespace, arguments: list[str]) -> Any:
    from lightspine.benchmark.noise import describe_busy_machine, describe_spread
    from lightspine.benchmark.runner import Destination, bench_models
    from lightspine.benchmark.settings import BenchSettings
    from lightspine.benchmark.system import load_average

    specs, preset_settings = _select_models(args)
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
    destination = Destination(
        folder=args.out,
        resume=args.resume,
        # The command repeats the run from the start.
        command=("lightspine", "bench", *(word for word in arguments if word != "--resume")),
        preset=args.preset,
    )

    def start(steps: int) -> None:
        # Called when all arguments are checked.
        warn(describe_busy_machine(load_average(), settings.threads))
        set_total(steps)

    with _progress() as (set_total, advance):
        result = bench_models(
            specs,
            settings,
            destination,
            on_plan=start,
            on_step=advance,
        )
    timings = {
        f"{row.model} ({part.replace('_', ' ')}, {row.mode}, batch {row.batch})": timing
        for row in result.rows
        for part in ("forward", "train_step")
        if (timing := getattr(row, part)) is not None
    }
    warn(describe_spread(timings))
    return result


def _select_models(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Return the models of the preset and of the command line, and the settings of the preset."""
    from lightspine.benchmark.model_specs import parse_model
    from lightspine.benchmark.presets import find_preset, with_published
    from lightspine.errors import UsageError

    if args.preset is None and not args.models:
        raise UsageError(
            "expected models, --preset, --list-presets, ops or data (see `lightspine bench --help`)"
        )
    specs: list[Any] = []
    settings: dict[str, Any] = {}
    if args.preset is not None:
        preset = find_preset(args.preset)
        specs, settings = list(preset.specs), preset.settings
        if args.only is not None:
            specs = _select_rows(specs, args.only, args.preset)
    elif args.only is not None:
        raise UsageError("--only selects models of a preset: give --preset too")
    named = [with_published(parse_model(name)) for name in dict.fromkeys(args.models)]
    return specs + [spec for spec in named if spec not in specs], settings


def _select_rows(specs: list[Any], names: tuple[str, ...], preset: str) -> list[Any]:
    """Return the rows of a preset with these names.

    Raises:
        UsageError: the preset has no model of a name.
    """
    from lightspine.benchmark.model_specs import TIMM_PREFIX
    from lightspine.errors import UsageError

    by_name: dict[str, list[Any]] = {}
    for spec in specs:
        name = f"{TIMM_PREFIX}{spec.name}" if spec.source == "timm" else spec.name
        by_name.setdefault(name, []).append(spec)
    if unknown := [name for name in names if name not in by_name]:
        raise UsageError(
            f"expected --only with models of the preset {preset}, {', '.join(by_name)}, got {unknown[0]}"
        )
    return [spec for name in names for spec in by_name[name]]


def _run_ops(args: argparse.Namespace) -> int:
    from lightspine.benchmark.noise import default_threads, describe_busy_machine, describe_spread
    from lightspine.benchmark.ops import count_steps, measure_ops
    from lightspine.benchmark.ops_cases import CASES, find_cases
    from lightspine.errors import UsageError

    cases = list(CASES) if args.shapes is None else find_cases(args.shapes)
    if args.device == "cuda":
        return _run_cuda_ops(args, cases)
    if args.dtype not in (None, ("float32",)):
        raise UsageError(f"expected dtype float32 on cpu, got {', '.join(args.dtype)}")
    batches, parts = args.batch or (1, 8), args.parts or PARTS
    threads = default_threads() if args.threads is None else args.threads
    with _progress() as (set_total, advance):
        set_total(count_steps(cases, batches, parts))
        report = measure_ops(
            cases,
            batches,
            threads=threads,
            repeats=args.repeats,
            parts=parts,
            on_step=advance,
        )
    timings = {
        f"{row.case.name} ({name}, batch {row.batch})": timing
        for row in report.rows
        for name, timing in row.times.items()
    }
    warn(describe_busy_machine(report.load_before, threads))
    warn(describe_spread(timings))
    if args.json:
        print_json(report.as_dict())
        return 0
    from lightspine_cli._bench_output import print_ops

    print_ops(report)
    return 0


def _run_data(args: argparse.Namespace) -> int:
    from lightspine.benchmark.data_loading import measure_loading
    from lightspine.benchmark.noise import describe_busy_machine

    with _progress() as (set_total, advance):
        set_total(1 + len(args.workers))
        report = measure_loading(
            args.folder,
            size=args.size,
            augmentation=args.augmentation,
            workers=args.workers,
            batch=args.batch,
            images=args.images,
            decode=args.decode,
            on_step=advance,
        )
    warn(describe_busy_machine(report.load_before, max(1, *args.workers)))
    if args.json:
        print_json(report.as_dict())
    else:
        from lightspine_cli._bench_output import print_loading

        print_loading(report)
    return 0


def _run_cuda_ops(args: argparse.Namespace, cases: list[Any]) -> int:
    """Measure on a CUDA device; return 1 if an operator failed."""
    from lightspine.benchmark import ops_cuda

    rows = ops_cuda.plan_rows(cases, args.batch, args.dtype or ("bfloat16",))
    device = ops_cuda.CudaDevice()
    with _progress() as (set_total, advance):
        set_total(len(rows))
        report = ops_cuda.measure_cuda_ops(
            rows,
            device,
            repeats=args.repeats,
            parts=args.parts or ops_cuda.PARTS,
            on_step=advance,
        )
    if args.json:
        print_json(report.as_dict())
    else:
        from lightspine_cli._bench_output import print_cuda_ops

        print_cuda_ops(report)
    return int(any(row.error is not None for row in report.rows))


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int], None], Callable[..., None]]]:
    """Show progress on standard error, with a bar in a terminal or else with a line every 30 seconds.

    Yields:
        A function that sets the number of steps, and one that shows a text after a number of steps (1).
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lightspine.utils.progress import LineTimer, bar_text, print_line

    timer, terminal = LineTimer(), sys.stderr.isatty()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not terminal,
    ) as progress:
        task = progress.add_task("starting", total=None)

        def advance(text: str, steps: int = 1) -> None:
            progress.update(task, advance=steps, description=bar_text(text))
            if not terminal and timer.is_due():
                done, total = progress.tasks[0].completed, progress.tasks[0].total
                print_line(f"benchmark, step {done:.0f}/{total:.0f}: {text}")

        yield lambda total: progress.update(task, total=total), advance
