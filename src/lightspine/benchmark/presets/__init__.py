"""Benchmark presets: the model comparisons of the papers, and the figures published by the authors.

`presets.yaml` lists the models and settings of each preset. `published.csv` holds the authors' accuracy and
throughput with their sources; nothing in it was measured with this library.
"""

import csv
import difflib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import timm
import yaml

from lightspine.benchmark.model_specs import TIMM_PREFIX, ModelSpec, parse_model
from lightspine.benchmark.results import PublishedFigures
from lightspine.errors import UsageError

__all__ = ["Preset", "find_preset", "find_published", "list_presets", "with_published"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model comparison from a paper.

    Attributes:
        name: such as "vmamba-steps".
        title: one-line title.
        about: what is compared.
        settings: keyword arguments of `BenchSettings`.
        specs: the models, including those that are not available here.
    """

    name: str
    title: str
    about: str
    settings: dict[str, Any]
    specs: tuple[ModelSpec, ...]


def list_presets() -> list[Preset]:
    """Return all presets."""
    return [find_preset(name) for name in _preset_definitions()]


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UsageError: there is no preset of that name.
    """
    definitions = _preset_definitions()
    if name not in definitions:
        close = difflib.get_close_matches(name, definitions, n=2, cutoff=0.5)
        hint = f"the closest are {', '.join(close)}" if close else f"expected one of {', '.join(definitions)}"
        raise UsageError(f"unknown preset {name!r}; {hint}")
    definition = definitions[name]
    settings = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in definition["settings"].items()
    }
    if "sizes" in settings:
        settings["sizes"] = tuple((side, side) for side in settings["sizes"])
    return Preset(
        name=name,
        title=definition["title"],
        about=definition["about"],
        settings=settings,
        specs=tuple(_parse_preset_row(row) for row in definition["rows"]),
    )


def find_published(model: str, variant: str | None = None) -> PublishedFigures | None:
    """Return the published figures of a model, or `None` if there are none.

    Args:
        model: registered name, with or without a pretrained tag, of lightspine or timm.
        variant: a configuration of the model with figures of its own, such as a step of an ablation.
    """
    return _published_figures().get((model.partition(".")[0], variant or ""))


def with_published(spec: ModelSpec) -> ModelSpec:
    """Return a copy of `spec` with its published figures filled in."""
    return replace(spec, published=find_published(spec.name, spec.variant))


def _parse_preset_row(row: dict[str, Any]) -> ModelSpec:
    row = dict(row)
    if "absent" in row:
        spec = ModelSpec(
            name=row["absent"],
            source=row.get("source", "timm"),
            variant=row.get("variant"),
            absent=row.get("note") or "timm has no such model",
        )
        return with_published(spec)
    name = row.pop("model")
    try:
        model = parse_model(name)
    except UsageError:
        # An older timm lacks some models; the rest of the preset can still be measured.
        absent = f"timm {timm.__version__} has no such model"
        model = ModelSpec(name=name.removeprefix(TIMM_PREFIX), source="timm", absent=absent)
    return with_published(replace(model, **row))


@cache
def _preset_definitions() -> dict[str, Any]:
    definitions: dict[str, Any] = yaml.safe_load(_read_data_file("presets.yaml"))
    return definitions


@cache
def _published_figures() -> dict[tuple[str, str], PublishedFigures]:
    rows = csv.DictReader(_read_data_file("published.csv").splitlines())
    return {(row["model"], row["variant"]): _parse_published_row(row) for row in rows}


def _parse_published_row(row: dict[str, str]) -> PublishedFigures:
    numbers = {
        name: float(row[name]) if row[name] else None for name in ("top1", "throughput", "macs_g", "params_m")
    }
    return PublishedFigures(
        **numbers, throughput_device=row["throughput_device"] or None, source=row["source"]
    )


def _read_data_file(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")
