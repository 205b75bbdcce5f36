"""The authors' figures, each with where it is printed; nothing in them was measured here."""

import csv
from functools import cache
from pathlib import Path

from lightspine.benchmark.results import PublishedFigures


def find_published(model: str, variant: str | None = None) -> PublishedFigures | None:
    """Return what authors print about a model, or `None` where we know of nothing.

    Args:
        model: its registered name, with or without a pretrained tag, whichever implementation.
        variant: a configuration of it that is printed by itself, such as a step.
    """
    return _figures().get((model.partition(".")[0], variant or ""))


@cache
def _figures() -> dict[tuple[str, str], PublishedFigures]:
    with (Path(__file__).parent / "published.csv").open(encoding="utf-8", newline="") as file:
        return {(row["model"], row["variant"]): _as_figures(row) for row in csv.DictReader(file)}


def _as_figures(row: dict[str, str]) -> PublishedFigures:
    return PublishedFigures(
        top1=_number(row["top1"]),
        throughput=_number(row["throughput"]),
        throughput_device=row["throughput_device"] or None,
        macs_g=_number(row["macs_g"]),
        params_m=_number(row["params_m"]),
        source=row["source"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
