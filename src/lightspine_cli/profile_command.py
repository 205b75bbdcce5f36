"""Profile one model: time per module, per module class and per PyTorch operator."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lightspine_cli._output import print_json, print_pairs, print_table, print_text, warn
from lightspine_cli.bench_command import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine profile`."""
    parser.add_argument("model", metavar="NAME|FILE", help="NAME, timm/NAME or a checkpoint file")
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="224|448x672",
        help="image size in pixels, or HxW (default: the model's evaluation size)",
    )
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    parser.add_argument(
        "--mode",
        choices=("eager", "optimized"),
        default="eager",
        help="model as trained, or optimized for inference (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)"
    )
    parser.add_argument("--train", action="store_true", help="profile a training step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: OMP_NUM_THREADS, or 2)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per measurement (default: %(default)s)")
    parser.add_argument("--top", type=int, default=15, help="rows of each table (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write profile.json and trace.json here")
    parser.add_argument("--json", action="store_true", help="print the profile as JSON")


def run(args: argparse.Namespace) -> int:
    """Profile the model and print the tables."""
    from rich.console import Console

    from lightspine.benchmark import Timing
    from lightspine.benchmark.model_specs import parse_model
    from lightspine.benchmark.noise import default_threads, describe_busy_machine, describe_spread
    from lightspine.benchmark.profiling import ProfileSettings, profile_model
    from lightspine.errors import UsageError
    from lightspine.utils.progress import bar_text

    if args.top < 1:
        raise UsageError(f"--top must be at least 1, got {args.top}")
    settings = ProfileSettings(
        batch=args.batch,
        size=args.size,
        mode=args.mode,
        dtype=args.dtype,
        device=args.device,
        threads=default_threads() if args.threads is None else args.threads,
        train=args.train,
        repeats=args.repeats,
    )
    spec = parse_model(args.model)
    console = Console(stderr=True)
    if sys.stderr.isatty():
        with console.status("starting") as status:
            profile = profile_model(
                spec, settings, args.out, on_step=lambda text: status.update(bar_text(text))
            )
    else:
        profile = profile_model(spec, settings, args.out)
    timing = Timing(median_ms=profile.run_ms, p90_ms=profile.run_p90_ms, repeats=settings.repeats)
    warn(describe_busy_machine(profile.system["load_average"], settings.threads))
    warn(describe_spread({profile.model: timing}))
    if args.json:
        print_json(profile.as_dict())
    else:
        _print_profile(profile, args.top, args.out)
    return 0


def _print_profile(profile: Any, top: int, folder: Path | None) -> None:
    settings, operators = profile.settings, profile.operators
    height, width = settings["size"]
    what = "training step" if settings["train"] else "forward pass"
    print_pairs(
        [
            ("model", f"{profile.model}, {profile.source}, {settings['mode']}, {settings['dtype']}"),
            ("images", f"{settings['batch']} x {height} x {width}"),
            ("processor", f"{profile.system['processor']}, threads: {settings['threads']}"),
            (what, f"{profile.run_ms:.1f} ms; under the profiler {operators.run_ms:.1f} ms"),
            ("scans", f"{operators.scan_ms:.1f} ms, {100 * operators.scan_share:.1f} % of it"),
        ]
    )
    whole = profile.modules[0].total_ms
    print_text()
    print_table(
        ("module class", ">own ms", ">% of forward"),
        [(kind, f"{ms:.2f}", f"{100 * ms / whole:.1f}") for kind, ms in list(profile.kinds.items())[:top]],
    )
    print_text()
    print_table(
        ("module", "class", ">calls", ">ms", ">own ms", ">% of forward"),
        [
            (
                module.name or "(the model)",
                module.kind,
                str(module.calls),
                f"{module.total_ms:.2f}",
                f"{module.own_ms:.2f}",
                f"{100 * module.total_ms / whole:.1f}",
            )
            for module in profile.modules[:top]
        ],
    )
    print_text()
    print_table(
        ("operator", ">calls", ">own ms", ">% of run"),
        [
            (
                operator.name,
                str(operator.calls),
                f"{operator.own_ms:.2f}",
                f"{100 * operator.own_ms / operators.run_ms:.1f}",
            )
            for operator in operators.operators[:top]
        ],
    )
    if folder is not None:
        print_text()
        print_text(f"{folder}: profile.json lists every module and operator; open trace.json in Perfetto")
