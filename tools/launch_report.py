"""Count the kernel launches and bytes of models on an H100 or H200, without a device.

    python tools/launch_report.py [MODEL ...] [--batch 128] [--copy-rate 4223] [--json]

Models are counted as created and optimized, in bfloat16, whole and per block. `floor_ms` is the time to move
the bytes once at the copy rate in GB/s; the default is what an H200 was measured to copy, read and written
bytes together. It is a lower bound: products are limited by arithmetic too, and no kernel reaches that rate.
`lightspine.benchmark.launches` says what is counted.
"""

import argparse
import json
import sys
from typing import Any

import torch

import lightspine
from lightspine.benchmark.launches import LaunchReport, Traffic, count_launches
from lightspine.models import get_record

MODELS = (
    "vmamba_tiny",
    "vim_tiny",
    "shvit_s1",
    "shvit_s4",
    "efficientvim_m1",
    "efficientvim_m4",
    "efficientmod_s",
)
FORMS = {"as created": None, "optimized": lightspine.optimize}


def report_model(name: str, batch: int, copy_rate: float) -> list[dict[str, Any]]:
    """Return the rows of one model: the whole and each stage's mean block, in both forms."""
    model = lightspine.create_model(name).eval()
    size = (batch, *get_record(name).input_size)
    reports = {form: count_launches(model, size, torch.bfloat16, change) for form, change in FORMS.items()}
    rows = []
    for part in ("model", *reports["optimized"].blocks):
        row: dict[str, Any] = {"model": name, "part": part}
        for form, report in reports.items():
            traffic, count = _part(report, part)
            row[form] = {
                "launches": traffic.launches / count,
                "gigabytes": traffic.bytes / count / 1e9,
                "floor_ms": traffic.bytes / count / copy_rate / 1e6,
            }
        rows.append(row)
    return rows


def _part(report: LaunchReport, part: str) -> tuple[Traffic, int]:
    if part == "model":
        return report.total, 1
    return report.blocks[part], report.block_counts[part]


def main(arguments: list[str]) -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description="Count kernel launches and bytes of models on a GPU.")
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--copy-rate", type=float, default=4223.0, help="GB/s (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows += report_model(name, args.batch, args.copy_rate)
        sys.stderr.write(f"{name}: done\n")
    if args.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    sys.stdout.write("| model | part | launches | optimized | GB | optimized | floor ms | optimized |\n")
    sys.stdout.write("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
    for row in rows:
        cells = [
            f"{row[form][key]:.{digits}f}"
            for key, digits in (("launches", 0), ("gigabytes", 2), ("floor_ms", 2))
            for form in FORMS
        ]
        sys.stdout.write(f"| {row['model']} | {row['part']} | {' | '.join(cells)} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
