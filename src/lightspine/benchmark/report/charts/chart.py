"""One chart: what it shows, how it is drawn, and the forms in which it is written."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from lightspine.benchmark.report.charts.inline import inline_svg
from lightspine.benchmark.report.charts.style import FILE, NARROW, WIDE, Layout, report_style

_PNG_DPI = 160


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A drawn chart.

    Attributes:
        figure: the picture.
        tips: what the page says when a mark is pointed at, by the `gid` of the mark.
        note: what the reader must know of this drawing alone, such as labels left out.
    """

    figure: Figure
    tips: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart before it is drawn.

    Attributes:
        name: stem of its files, unique in a report, of letters, digits and hyphens.
        title: what it shows.
        description: the same for who cannot see it, with its main figures.
        caption: how to read it.
        draw: draws it for a layout.
    """

    name: str
    title: str
    description: str
    caption: str
    draw: Callable[[Layout], Drawing]


@dataclass(frozen=True, kw_only=True)
class DrawnChart:
    """A chart as it is written.

    Attributes:
        chart: what was drawn.
        png: the picture for slides.
        svg: the picture for print.
        wide: for the page, on a screen.
        narrow: for the page, on a telephone.
        wide_note: what the reader must know of the wide drawing alone.
        narrow_note: the same of the narrow one.
    """

    chart: Chart
    png: bytes
    svg: bytes
    wide: Markup
    narrow: Markup
    wide_note: str
    narrow_note: str


def draw_chart(chart: Chart) -> DrawnChart:
    """Draw a chart for its files and for both widths of the page."""
    with report_style():
        in_file, wide, narrow = (chart.draw(layout) for layout in (FILE, WIDE, NARROW))
        return DrawnChart(
            chart=chart,
            png=_saved(in_file.figure, "png", dpi=_PNG_DPI),
            svg=_saved(in_file.figure, "svg", metadata={"Date": None, "Title": chart.title}),
            wide=_for_page(chart, wide, "wide"),
            narrow=_for_page(chart, narrow, "narrow"),
            wide_note=wide.note,
            narrow_note=narrow.note,
        )


def _saved(figure: Figure, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _for_page(chart: Chart, drawing: Drawing, width: str) -> Markup:
    svg = _saved(drawing.figure, "svg", metadata={"Date": None})
    return inline_svg(
        svg, name=f"{chart.name}-{width}", description=chart.description, css_class=width, tips=drawing.tips
    )
