"""Fills the page's template; everything that comes out of a file is escaped on its way."""

from collections.abc import Callable, Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lightspine.benchmark.report.charts.chart import DrawnChart
from lightspine.benchmark.report.charts.style import page_inks
from lightspine.benchmark.report.conditions import size_of
from lightspine.benchmark.report.page.run import RunPart

_PACKAGE = "lightspine.benchmark.report.page"


def render_page(
    *,
    title: str,
    counts: str,
    runs: Sequence[RunPart],
    systems: Sequence[tuple[str, list[tuple[str, str]]]],
    chart: Callable[[str], DrawnChart],
    version: str,
) -> str:
    """Return the page as HTML.

    Args:
        title: its heading.
        counts: how many rows were measured in all and how many not.
        runs: its parts.
        systems: the machines, each with the names of the runs on it and what is known about it.
        chart: finds a drawn chart by its name.
        version: of this library.
    """
    environment = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=title,
        counts=counts,
        runs=runs,
        systems=systems,
        chart=chart,
        version=version,
        size_of=size_of,
        breakable=_breakable,
        style=_inks() + _own("report.css"),
        script=_own("report.js"),
    )


def _inks() -> Markup:
    light, dark = (
        "".join(f"--{name}:{ink[scheme]};" for name, ink in page_inks().items()) for scheme in (0, 1)
    )
    return Markup(
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        # Paper is white whatever the screen was.
        f"@media print{{:root{{{light}}}}}\n"
    )


def _breakable(name: str) -> Markup:
    """Return a name that a narrow column may break behind its underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _own(name: str) -> Markup:
    text = (files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8")
    return Markup(text)
