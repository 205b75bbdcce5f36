"""What a result file says about its run, as pairs of name and words."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightspine.benchmark.presets import Preset, list_presets
from lightspine.benchmark.report.conditions import status_in_words
from lightspine.benchmark.report.numbers import TIMES, number
from lightspine.benchmark.results import BenchResult, Row

_MOST_NAMED = 3


def run_title(result: BenchResult) -> str:
    """Return the name of a run: its preset, or its first models."""
    if result.preset:
        preset = _preset(result)
        return preset.title if preset else result.preset
    names = list(dict.fromkeys(row.model for row in result.rows))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def run_about(result: BenchResult) -> str:
    """Return what the run's preset compares; nothing where it has none, or one of another version."""
    preset = _preset(result)
    return f"Preset {preset.name}. {preset.about}" if preset else ""


def step_order(result: BenchResult) -> list[str]:
    """Return the steps of the run's preset in their order; none where it has none or is not known."""
    preset = _preset(result)
    return [spec.variant for spec in preset.specs if spec.variant] if preset else []


def _preset(result: BenchResult) -> Preset | None:
    return next((preset for preset in list_presets() if preset.name == result.preset), None)


def command_line(result: BenchResult) -> str:
    """Return the command that repeats a run, ready for a shell."""
    return shlex.join(result.command)


def count_in_words(rows: Iterable[Row]) -> str:
    """Return how many rows were measured and how many not, such as `3 measured, 1 absent`."""
    counts = Counter("measured" if row.status == "ok" else status_in_words(row) for row in rows)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def system_facts(result: BenchResult) -> list[tuple[str, str]]:
    """Return what the file says about the machine; without the date, so that runs on one machine agree."""
    return [pair for pair in _facts(result.system) if pair[0] != "date"]


def run_facts(result: BenchResult) -> list[tuple[str, str]]:
    """Return date, settings and the rate of matrix products of a run."""
    rates = {
        f"matrix product, {dtype}": f"{number(rate)} GFLOP/s" for dtype, rate in result.matmul_gflops.items()
    }
    return [
        *_facts({"date": result.system.get("date", "not said")}),
        *rates.items(),
        *_facts(result.settings),
    ]


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _in_words(value)) for name, value in values.items()]


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        # A package without a version is not installed.
        return ", ".join(f"{name} {_in_words(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        # A list in a list is a size, such as 224 by 224.
        return ", ".join(
            TIMES.join(map(_in_words, item)) if isinstance(item, list) else _in_words(item) for item in value
        )
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)
