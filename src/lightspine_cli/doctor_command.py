"""Show versions, devices, threads and available scan backends; --verify checks their kernels."""

import argparse
from typing import Any

from lightspine_cli._output import print_json, print_pairs, print_table, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine doctor`."""
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run every kernel on this machine in float32, float16, bfloat16 and float64, compare outputs "
        "and gradients with the reference in float64, and exit with status 1 if one is wrong; takes minutes "
        "if the kernels must be compiled first",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0, even if a package or backend is missing.

    Raises:
        LightspineError: with --verify, a kernel is wrong.
    """
    from lightspine.benchmark.system import describe_system
    from lightspine.ops.dispatch import available_backends, cpu_thread_source

    system = describe_system() | {"threads of the scans": cpu_thread_source()}
    backends = {
        name: {"runs": runs, "reason": reason} for name, (runs, reason) in available_backends().items()
    }
    results = _verify_kernels() if args.verify else []
    if args.json:
        verification = {"verification": [result.as_dict() for result in results]} if args.verify else {}
        print_json(system | {"scan_backends": backends} | verification)
    else:
        _print_report(system, backends)
        if args.verify:
            _print_verification(results)
    if wrong := [_describe_failure(result) for result in results if not result.correct]:
        from lightspine.errors import LightspineError

        raise LightspineError(f"{len(wrong)} of {len(results)} checks of kernels failed: {'; '.join(wrong)}")
    return 0


def _verify_kernels() -> list[Any]:
    from lightspine.ops.verify import plan_checks, verify
    from lightspine.utils.progress import progress_bar

    return [verify(check) for check in progress_bar(plan_checks(), "verifying kernels")]


def _print_report(system: dict[str, Any], backends: dict[str, dict[str, Any]]) -> None:
    single = {name: value for name, value in system.items() if name not in ("versions", "devices")}
    print_pairs((name, str(value)) for name, value in single.items())
    print_text()
    print_pairs((name, version or "not installed") for name, version in system["versions"].items())
    print_text()
    print_pairs(("device", device) for device in system["devices"])
    print_text()
    print_table(
        ("scan backend", "available", "reason"),
        [(name, "yes" if entry["runs"] else "no", str(entry["reason"])) for name, entry in backends.items()],
    )


def _print_verification(results: list[Any]) -> None:
    print_text()
    print_table(
        (
            "operator",
            "backend",
            "device",
            "dtype",
            ">difference",
            ">tolerance",
            "largest in",
            ">first call s",
            "",
        ),
        [
            (
                result.operator,
                result.backend,
                result.device,
                result.dtype,
                f"{result.differences[result.worst]:.1e}" if result.worst else "-",
                f"{result.tolerance:.0e}",
                result.worst or "-",
                f"{result.first_call_s:.2f}",
                "correct" if result.correct else "failed" if result.error else "wrong",
            )
            for result in results
        ],
        title="kernels compared with the reference in float64",
    )
    print_text()
    print_pairs(
        [
            ("difference", "largest relative L2 difference of all outputs and gradients at several sizes"),
            ("first call", "forward and backward, including compiling the kernels or reading them from disk"),
        ]
    )


def _describe_failure(result: Any) -> str:
    where = f"{result.operator} on {result.backend} in {result.dtype}"
    if result.error:
        return f"{where} failed with {result.error}"
    tensors = ", ".join(f"{name} by {result.differences[name]:.1e}" for name in result.wrong)
    return f"{where} is off in {tensors}, expected {result.tolerance:.0e}"
