"""HTML page of a benchmark report; every text from a result file is escaped."""

import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lightspine._version import __version__
from lightspine.benchmark.plot_style import COLORS
from lightspine.benchmark.presets import Preset, list_presets
from lightspine.benchmark.report.charts import (
    Chart,
    accuracy_charts,
    latency_charts,
    mode_charts,
    sweep_charts,
    training_charts,
)
from lightspine.benchmark.report.conditions import TIMES, format_number, format_size, format_status
from lightspine.benchmark.report.sweeps import Exponent, find_exponents, find_sweeps
from lightspine.benchmark.report.tables import Table, measurement_table
from lightspine.benchmark.results import BenchResult, Row
from lightspine.utils.printable import printable

_PACKAGE = "lightspine.benchmark.report"
_MAX_MODELS_IN_TITLE = 3
_ID_REFERENCE = re.compile(r"(?<=#)[\w.-]+(?=\))")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts under one heading.

    Attributes:
        title: the heading.
        charts: at least one.
        exponents: rows of the table below the charts of a resolution sweep.
    """

    title: str
    charts: list[Chart]
    exponents: Sequence[Exponent] = ()


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """The part of the page about one result file.

    Attributes:
        name: unique in the page, for links and file names.
        title: heading.
        about: what is compared; may be empty.
        counts: number of rows by status.
        command: command line that repeats the run.
        sections: charts.
        table: all rows.
        unmeasured: rows without a measurement, with their status.
        facts: date, settings and matrix product rates.
        system: description of the machine.
    """

    name: str
    title: str
    about: str
    counts: str
    command: str
    sections: list[Section]
    table: Table
    unmeasured: list[tuple[Row, str]]
    facts: list[tuple[str, str]]
    system: list[tuple[str, str]]

    @property
    def charts(self) -> list[Chart]:
        """All charts in the order of the page."""
        return [chart for section in self.sections for chart in section.charts]


def make_run_part(result: BenchResult, name: str) -> RunPart:
    """Create the charts and tables of a result file.

    Args:
        result: the file.
        name: unique in the page.
    """
    rows = [row for row in result.rows if row.status != "absent"]
    preset = next((preset for preset in list_presets() if preset.name == result.preset), None)
    sweeps, accuracy = find_sweeps(rows), accuracy_charts(rows, name)
    # The other charts already show the latency.
    latency = [] if accuracy or sweeps else latency_charts(rows, name)
    sections = [
        Section(title="Accuracy over latency", charts=accuracy),
        Section(title="Latency", charts=latency),
        Section(title="Training step", charts=[] if sweeps else training_charts(rows, name)),
        Section(
            title="Cost over image size", charts=sweep_charts(sweeps, name), exponents=find_exponents(sweeps)
        ),
        Section(title="Modes", charts=mode_charts(rows, name)),
    ]
    rates = {
        f"matrix product, {dtype}": f"{format_number(rate)} GFLOP/s"
        for dtype, rate in result.matmul_gflops.items()
    }
    return RunPart(
        name=name,
        title=_run_title(result, preset),
        about=f"Preset {preset.name}. {preset.about}" if preset else "",
        counts=count_rows(result.rows),
        command=shlex.join(result.command),
        sections=[section for section in sections if section.charts],
        table=measurement_table(result.rows),
        unmeasured=[(row, format_status(row)) for row in result.rows if row.status != "ok"],
        facts=[
            ("date", str(result.system.get("date", "unknown"))),
            *rates.items(),
            *_describe_values(result.settings),
        ],
        # Without the date, so that runs on the same machine are equal.
        system=_describe_values({key: value for key, value in result.system.items() if key != "date"}),
    )


def count_rows(rows: Iterable[Row]) -> str:
    """Return the number of rows by status, such as `3 measured, 1 absent`."""
    counts = Counter("measured" if row.status == "ok" else format_status(row) for row in rows)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def render_page(*, title: str, counts: str, runs: Sequence[RunPart], svg: Mapping[str, bytes]) -> str:
    """Return the page as HTML.

    Args:
        title: heading.
        counts: number of rows by status in all runs.
        runs: the parts.
        svg: the SVG file of each chart, by the chart's name.
    """
    environment = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        finalize=_escape_control_characters,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    systems: list[tuple[list[str], list[tuple[str, str]]]] = []
    for run in runs:
        titles = next((titles for titles, system in systems if system == run.system), None)
        if titles is None:
            systems.append(([run.title], run.system))
        else:
            titles.append(run.title)
    return environment.get_template("report.html").render(
        title=title,
        counts=counts,
        runs=runs,
        systems=[(", ".join(titles), system) for titles, system in systems],
        draw=lambda chart: inline_svg(svg[chart.name], name=chart.name, alt=chart.alt),
        version=__version__,
        format_size=format_size,
        breakable=_allow_breaks,
        style=_color_variables() + _read_template("report.css"),
        script=_read_template("report.js"),
    )


def _escape_control_characters(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def inline_svg(svg: bytes, *, name: str, alt: str) -> Markup:
    """Turn an SVG file of matplotlib into an `<svg>` element of a page.

    Ids get a prefix to be unique in the page, colors become CSS variables that follow the dark scheme, and
    text takes the font of the page.

    Args:
        svg: the file.
        name: prefix of the ids.
        alt: description for screen readers.
    """
    root = ET.fromstring(svg)
    variables = {color.light: f"var(--{key})" for key, color in COLORS.items()}
    for parent in root.iter():
        # A `<style>` element would apply to the whole page.
        for child in [child for child in parent if _local_name(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local_name(element.tag)
        attributes = {_local_name(key): value for key, value in element.attrib.items()}
        style = [re.sub(r"font-family:[^;]*;?\s*", "", attributes.pop("style", ""))]
        for key, value in list(attributes.items()):
            if key == "id":
                attributes[key] = f"{name}-{value}"
            elif key == "href":
                attributes[key] = f"#{name}-{value.removeprefix('#')}"
            elif "url(#" in value:
                attributes[key] = _ID_REFERENCE.sub(lambda match: f"{name}-{match[0]}", value)
            elif key in ("fill", "stroke") and value in variables:
                # CSS variables work in the style attribute only.
                style.insert(0, f"{key}: {attributes.pop(key)}")
        text = "; ".join(filter(None, style))
        if text:
            text = _ID_REFERENCE.sub(lambda match: f"{name}-{match[0]}", text)
            attributes["style"] = re.sub(
                r"#[0-9a-f]{6}", lambda match: variables.get(match[0], match[0]), text
            )
        element.attrib = attributes
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    # ElementTree escapes text and attributes.
    return Markup(ET.tostring(root, encoding="unicode"))


def _local_name(name: str) -> str:
    return name.rpartition("}")[2]


def _run_title(result: BenchResult, preset: Preset | None) -> str:
    if preset or result.preset:
        return preset.title if preset else str(result.preset)
    names = list(dict.fromkeys(row.model for row in result.rows))
    hidden = len(names) - _MAX_MODELS_IN_TITLE
    return ", ".join(names[:_MAX_MODELS_IN_TITLE]) + (f" and {hidden} more" if hidden > 0 else "")


def _describe_values(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _describe_value(value)) for name, value in values.items()]


def _describe_value(value: Any) -> str:
    if isinstance(value, Mapping):
        # A package without a version is not installed.
        return ", ".join(
            f"{name} {_describe_value(item)}" for name, item in value.items() if item is not None
        )
    if isinstance(value, list):
        # A list in a list is an image size.
        return ", ".join(
            TIMES.join(map(_describe_value, item)) if isinstance(item, list) else _describe_value(item)
            for item in value
        )
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value)


def _color_variables() -> Markup:
    light, dark = (
        "".join(f"--{name}:{color[scheme]};" for name, color in COLORS.items()) for scheme in (0, 1)
    )
    return Markup(
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        # Printed pages use the light colors.
        f"@media print{{:root{{{light}}}}}\n"
    )


def _allow_breaks(name: str) -> Markup:
    """Allow line breaks after the underscores of a name."""
    return escape(printable(name)).replace("_", Markup("_<wbr>"))


def _read_template(name: str) -> Markup:
    return Markup((files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8"))
