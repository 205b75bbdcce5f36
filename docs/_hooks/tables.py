"""MkDocs hook that generates the tables of the site from the registry, recipes and benchmark results.

It replaces comments on lines of their own: `<!-- variants vmamba -->`, `<!-- recipes vmamba -->`,
`<!-- choosing -->` and `<!-- measured vmamba -->`.
"""

import csv
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import lightspine
from lightspine.benchmark.model_specs import OFFICIAL_PREFIX, ModelSpec, evaluation_size
from lightspine.models import get_record

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_MARK = re.compile(r"^<!-- (variants|recipes|choosing|measured)(?: (\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the comments of a page by tables (called by MkDocs)."""
    return _MARK.sub(lambda match: TABLES[match[1]](match[2] or "*"), markdown)


def variants(family: str) -> str:
    """Return the variants of a family with size and published accuracy."""
    rows = [
        "| model | parameters | input | published GMACs | published top-1 % |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for record in _records(family):
        published = record.published
        note = f" ({published.note})" if published.note else ""
        rows.append(
            f"| `{record.name}` | {record.params / 1e6:.1f} M | {record.input_size[1]} "
            f"| {published.macs_g or '-'} | {published.top1 or '-'}{note} |"
        )
    return "\n".join(rows)


def recipes(family: str) -> str:
    """Return the recipes of a family with their published scores."""
    names = {record.name for record in _records(family)}
    text = resources.files("lightspine.recipes").joinpath("published.csv").read_text(encoding="utf-8")
    rows = ["| recipe | data | published | source |", "| --- | --- | --- | --- |"]
    for row in csv.DictReader(text.splitlines()):
        if row["model"] in names:
            scores = [
                f"{label} {row[key]}"
                for key, label in (
                    ("top1", "top-1"),
                    ("box_ap", "box AP"),
                    ("mask_ap", "mask AP"),
                    ("miou", "mIoU"),
                )
                if row[key]
            ]
            rows.append(
                f"| `{row['recipe']}` | {row['data']} | {', '.join(scores) or '-'} | {row['source']} |"
            )
    return "\n".join(rows)


def choosing(_: str) -> str:
    """Return published accuracy and measured speed of all models, fastest first."""
    rows = [
        "| model | published top-1 % | parameters | ms, batch 1 | images/s, batch 8 | MiB, batch 1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {}
    for row in _measured():
        if (
            row["mode"] == "optimized"
            and row["dtype"] == "float32"
            and row["batch"] in (1, 8)
            and _own_size(row)
        ):
            found.setdefault((row["source"], row["model"]), {})[row["batch"]] = row
    ordered = sorted(
        ((key, by) for key, by in found.items() if 1 in by),
        key=lambda item: item[1][1]["forward"]["median_ms"],
    )
    for (source, name), by in ordered:
        one, eight = by[1], by.get(8)
        top1 = _top1(source, name, one["published"])
        label = f"`{name}`" if source == "lightspine" else f"{name} (timm)"
        rows.append(
            f"| {label} | {top1} | {one['parameters'] / 1e6:.1f} M "
            f"| {one['forward']['median_ms']:.1f} "
            f"| {'-' if eight is None else format(eight['forward']['images_per_s'], '.1f')} "
            f"| {'-' if one['peak_memory_mib'] is None else format(one['peak_memory_mib'], '.0f')} |"
        )
    return "\n".join([*rows, "", _systems()])


def _own_size(row: dict[str, Any]) -> bool:
    """Return whether a row has the image size of the published accuracy and is no official baseline."""
    if row["model"].startswith(OFFICIAL_PREFIX):
        return False
    spec = ModelSpec(name=row["model"], source=row["source"])
    return (row["height"], row["width"]) == evaluation_size(spec)


def measured(family: str) -> str:
    """Return all measurements of a family."""
    names = {record.name for record in _records(family)}
    rows = [
        "| model | mode | type | batch | px | ms | images/s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in _measured():
        if row["source"] == "lightspine" and row["model"] in names:
            forward = row["forward"]
            rows.append(
                f"| `{row['model']}` | {row['mode']} | {row['dtype']} | {row['batch']} | {row['height']} "
                f"| {forward['median_ms']:.1f} | {forward['images_per_s']:.1f} |"
            )
    return "\n".join([*rows, "", _systems()])


def _top1(source: str, name: str, peer: dict[str, Any] | None) -> str:
    """Return the published accuracy with its note."""
    if source != "lightspine":
        return str((peer or {}).get("top1") or "-")
    published = get_record(name).published
    note = f" ({published.note})" if published.note else ""
    return f"{published.top1 or '-'}{note}"


def _records(family: str) -> list[Any]:
    records = [get_record(name) for name in lightspine.list_models()]
    return [record for record in records if family in ("*", record.family)]


def _files() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def _measured() -> list[dict[str, Any]]:
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in _files():
        for row in file["rows"]:
            if row["status"] == "ok" and row["forward"] is not None and row["variant"] is None:
                key = tuple(
                    row[name] for name in ("source", "model", "mode", "dtype", "batch", "height", "threads")
                )
                seen.setdefault(key, row)
    return list(seen.values())


def _systems() -> str:
    systems = {
        (file["system"]["processor"], file["settings"].get("threads"), file["system"]["versions"]["torch"])
        for file in _files()
    }
    places = "; ".join(
        f"{name}, threads: {threads}, PyTorch {torch}" for name, threads, torch in sorted(systems, key=str)
    )
    commands = "\n".join(f"    {' '.join(file['command'])}" for file in _files())
    return f"Measured on: {places}. Commands:\n\n{commands}\n" if places else "No measurements yet."


TABLES = {"variants": variants, "recipes": recipes, "choosing": choosing, "measured": measured}
