"""List published weights: those in the cache, and with --all those that can be downloaded."""

import argparse
from pathlib import Path
from typing import Any

from lightspine_cli._output import print_json, print_table, print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lightspine weights`."""
    parser.add_argument("--all", action="store_true", help="list all published weights and their sources")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the cached files with their SHA-256; exit 1 if one differs",
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="folder of the downloads")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the weights.

    Returns:
        1 if a file differs from what was downloaded, else 0.
    """
    from lightspine.models.weights import cached_weights, default_cache_dir

    if args.all:
        rows = _published_rows()
        if args.json:
            print_json(rows)
        else:
            columns = ("name", "published", "license", "source")
            cells = (("-" if value is None else str(value) for value in row.values()) for row in rows)
            print_table(columns, (tuple(row) for row in cells))
        return 0
    records = cached_weights(args.cache_dir)
    problems = [record.verify() if args.verify else None for record in records]
    rows = [
        record.as_dict() | ({"problem": problem} if args.verify else {})
        for record, problem in zip(records, problems, strict=True)
    ]
    if not rows and not args.json:
        print_text(
            f"no weights in {args.cache_dir or default_cache_dir()} (`lightspine weights --all` lists them)"
        )
        return 0
    if args.json:
        print_json(rows)
    else:
        for record, problem in zip(records, problems, strict=True):
            state = "" if not args.verify else f"   {problem or 'verified'}"
            print_text(
                f"{record.name or record.path.name}   {record.size / 2**20:.1f} MiB   {record.license}{state}"
            )
            print_text(f"    {record.path}", f"    {record.source}", f"    SHA-256 {record.sha256}")
    return int(any(problems))


def _published_rows() -> list[dict[str, Any]]:
    from lightspine.models import get_record, list_models
    from lightspine.models.dense_weights import DENSE_WEIGHTS
    from lightspine.models.registry import published_cfgs

    rows = []
    for model in list_models():
        top1 = get_record(model).published.top1
        for i, (name, cfg) in enumerate(published_cfgs(model).items()):
            source = cfg.url or f"hf-hub:{cfg.hf_hub_id}"
            # The published score is that of the first set of weights.
            score = None if i or top1 is None else f"{top1} % top-1"
            rows.append({"name": name, "published": score, "license": cfg.license, "source": source})
    for weights in DENSE_WEIGHTS.values():
        score = weights.score or None
        rows.append(
            {
                "name": weights.name,
                "published": score,
                "license": weights.cfg.license,
                "source": weights.url,
            }
        )
    return rows
