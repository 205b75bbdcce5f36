"""Create an HTML report from results of `lightspine bench`, with its charts as PNG and SVG."""

import argparse
from pathlib import Path

from lightspine_cli._output import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine report`."""
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="results.json of `lightspine bench`, or its folder",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lightspine-report"),
        metavar="FOLDER",
        help="folder for report.html and charts/ (default: %(default)s)",
    )
    parser.add_argument(
        "--title", default="Benchmark report", help="heading of the page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from lightspine.benchmark.report import write_report

    report = write_report(args.results, args.out, title=args.title, progress=True)
    pictures = len(report.charts) // 2
    print_text(
        f"{report.page}: {report.rows} rows ({report.counts}), {pictures} chart{'s' * (pictures != 1)}"
    )
    if report.charts:
        print_text(f"{report.charts[0].parent}: charts as PNG and SVG")
    return 0
