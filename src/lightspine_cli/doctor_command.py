"""Show versions, devices, threads and the availability of the scan backends."""

import argparse

from lightspine_cli._output import print_json, print_pairs, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine doctor`."""
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; the status is 0 even if a package or backend is missing."""
    from lightspine.benchmark.system import describe_system
    from lightspine.ops.dispatch import available_backends, cpu_thread_source

    system = describe_system() | {"threads of the scans": cpu_thread_source()}
    backends = {
        name: {"runs": runs, "reason": reason} for name, (runs, reason) in available_backends().items()
    }
    if args.json:
        print_json(system | {"scan_backends": backends})
        return 0
    versions = system.pop("versions")
    devices = system.pop("devices")
    print_pairs((name, str(value)) for name, value in system.items())
    print()
    print_pairs((name, version or "not installed") for name, version in versions.items())
    print()
    print_pairs(("device", device) for device in devices)
    print()
    print_table(
        ("scan backend", "available", "reason"),
        [(name, "yes" if entry["runs"] else "no", str(entry["reason"])) for name, entry in backends.items()],
    )
    return 0
