"""Draw the figure of the landing page from the committed benchmark results.

    python tools/landing_figure.py docs/drawings/accuracy_latency.png

Published ImageNet-1k top-1 accuracy over the measured latency of one image on a CPU; see docs/performance.md.
"""

import argparse
import json
from pathlib import Path

from lightspine.benchmark.scatter import ScatterPoint, plot_accuracy_over_latency
from lightspine.models import find_record

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks" / "results"
FILES = ("shvit-table", "efficientvim-table3", "efficientmod-latency", "vmamba-throughput")
MODES = ("optimized", "eager")


def fastest_points() -> list[ScatterPoint]:
    """Return each model with a published score in its fastest measured form, one image in float32."""
    best: dict[tuple[str, str], dict] = {}
    for name in FILES:
        for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
            top1 = (row.get("published") or {}).get("top1")
            if row["batch"] != 1 or row["dtype"] != "float32" or not row.get("forward") or top1 is None:
                continue
            if row["mode"] not in MODES or row["variant"] or "/" in row["source"]:
                continue
            key = row["source"], row["model"]
            if key not in best or row["forward"]["median_ms"] < best[key]["forward"]["median_ms"]:
                best[key] = row
    points = []
    for (source, name), row in best.items():
        record = find_record(name) if source == "lightspine" else None
        points.append(
            ScatterPoint(
                label=name,
                latency_ms=row["forward"]["median_ms"],
                accuracy=row["published"]["top1"],
                family=record.family if record else None,
                params=row["parameters"],
                keep_label=False,
            )
        )
    return points


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="file to write")
    out = parser.parse_args().out
    figure, _ = plot_accuracy_over_latency(
        fastest_points(),
        title="Accuracy and latency of one image on a CPU",
        note="Two threads of a Zen 4 CPU, float32; hollow: timm, in its fastest form. Accuracy as published.",
        x_label="milliseconds",
        y_label="ImageNet-1k top-1, percent",
    )
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
