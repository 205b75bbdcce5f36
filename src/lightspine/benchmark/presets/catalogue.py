"""The presets: which models a paper's table compares, and at which settings."""

import difflib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
import yaml

from lightspine.benchmark.models.specs import TIMM_PREFIX, ModelSpec, parse_model
from lightspine.benchmark.presets.published import find_published
from lightspine.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A table.

    Attributes:
        name: such as "vmamba-steps".
        title: one line.
        about: what is compared.
        settings: of `BenchSettings`, where they are not its defaults.
        specs: its models, also those that are absent.
    """

    name: str
    title: str
    about: str
    settings: dict[str, Any]
    specs: tuple[ModelSpec, ...]


def list_presets() -> list[Preset]:
    """Return all presets."""
    return [find_preset(name) for name in _content()]


def find_preset(name: str) -> Preset:
    """Return a preset.

    Raises:
        UsageError: there is none of that name.
    """
    content = _content()
    if name not in content:
        close = difflib.get_close_matches(name, content, n=2, cutoff=0.5)
        hint = f"the closest are {', '.join(close)}" if close else f"there are {', '.join(content)}"
        raise UsageError(f"unknown preset {name!r}; {hint}")
    entry = content[name]
    settings = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry["settings"].items()
    }
    if "sizes" in settings:
        settings["sizes"] = tuple((side, side) for side in settings["sizes"])
    return Preset(
        name=name,
        title=entry["title"],
        about=entry["about"],
        settings=settings,
        specs=tuple(_as_spec(row) for row in entry["rows"]),
    )


def with_published(spec: ModelSpec) -> ModelSpec:
    """Return a model with what its authors print about it."""
    return replace(spec, published=find_published(spec.name, spec.variant))


def _as_spec(row: dict[str, Any]) -> ModelSpec:
    row = dict(row)
    if "absent" in row:
        note = row.get("note")
        spec = ModelSpec(
            name=row["absent"],
            source=row.get("source", "timm"),
            variant=row.get("variant"),
            absent=note or "timm has no such model",
        )
        return with_published(spec)
    name = row.pop("model")
    try:
        model = parse_model(name)
    except UsageError:
        # Older versions of timm lack some of its models, which takes no other row from the table.
        absent = f"timm {timm.__version__} has no such model"
        model = ModelSpec(name=name.removeprefix(TIMM_PREFIX), source="timm", absent=absent)
    return with_published(replace(model, **row))


@cache
def _content() -> dict[str, Any]:
    text = (Path(__file__).parent / "presets.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content
