"""SVG images inlined in the report page."""

import xml.etree.ElementTree as ET

import pytest

from lightspine.benchmark.plot_style import COLORS
from lightspine.benchmark.report.page import inline_svg

SVG = f"""<?xml version="1.0" encoding="utf-8"?>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 10 10" width="10pt" xmlns="http://www.w3.org/2000/svg">
 <metadata><x/></metadata>
 <defs><style type="text/css">*{{stroke-linejoin: round}}</style><path id="m1" d="M 0 0"/></defs>
 <g id="point-0" clip-path="url(#p1)">
  <use xlink:href="#m1" style="fill: {COLORS["text"].light}; stroke: #123456"/>
 </g>
 <text style="font-size: 8px; font-family: 'A', 'B'; fill: {COLORS["muted"].light}">a &lt; b</text>
 <clipPath id="p1"><rect fill="{COLORS["background"].light}" width="1"/></clipPath>
</svg>""".encode()


@pytest.fixture
def element() -> ET.Element:
    return ET.fromstring(inline_svg(SVG, name="chart", alt='a "chart"'))


def test_identifiers_and_what_refers_to_them_take_the_name(element: ET.Element) -> None:
    assert {part.get("id") for part in element.iter()} - {None} == {"chart-m1", "chart-point-0", "chart-p1"}
    assert element.find("g").get("clip-path") == "url(#chart-p1)"  # type: ignore[union-attr]
    assert element.find("g/use").get("href") == "#chart-m1"  # type: ignore[union-attr]


def test_colours_of_the_style_become_variables_and_others_stay(element: ET.Element) -> None:
    assert element.find("g/use").get("style") == "fill: var(--text); stroke: #123456"  # type: ignore[union-attr]
    assert "var(--background)" in element.find("clipPath/rect").get("style", "")  # type: ignore[union-attr]


def test_style_sheet_and_metadata_of_the_file_are_left_out(element: ET.Element) -> None:
    assert {"style", "metadata"}.isdisjoint(part.tag for part in element.iter())


def test_text_stays_text_without_the_font_of_the_file(element: ET.Element) -> None:
    (text,) = element.iter("text")
    assert text.text == "a < b"
    assert "font-family" not in text.get("style", "")


def test_picture_is_described(element: ET.Element) -> None:
    assert (element.get("role"), element.get("aria-label")) == ("img", 'a "chart"')
