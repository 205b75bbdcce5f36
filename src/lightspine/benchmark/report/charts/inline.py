"""Turns an SVG file of matplotlib into a part of an HTML page."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

from markupsafe import Markup

from lightspine.benchmark.report.charts.style import page_inks

# Of the file alone: a style sheet in a page would hold for the whole page.
_FILE_ONLY = {"metadata", "style"}
_REFERENCE = re.compile(r"(?<=#)[\w.-]+(?=\))")
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")


def inline_svg(svg: bytes, *, name: str, description: str, css_class: str, tips: Mapping[str, str]) -> Markup:
    """Return a drawing as an `<svg>` element of a page.

    Its identifiers become unique in the page; its colours become the page's variables, so that they follow
    the dark scheme; its text takes the page's font.

    Args:
        svg: the file.
        name: unique in the page.
        description: read aloud in place of the picture.
        css_class: of the element.
        tips: what is shown when a group is pointed at, by the group's identifier.
    """
    root = ET.fromstring(svg)
    variables = {ink.light: f"var(--{key})" for key, ink in page_inks().items()}
    for parent in root.iter():
        for child in [child for child in parent if _local(child.tag) in _FILE_ONLY]:
            parent.remove(child)
    for element in root.iter():
        tip = tips.get(element.get("id", ""))
        _rename(element, name, variables)
        if tip is not None:
            title = ET.Element("title")
            title.text = tip
            element.insert(0, title)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": css_class,
        "role": "img",
        "aria-label": description,
    }
    # ElementTree escapes text and attributes.
    return Markup(ET.tostring(root, encoding="unicode"))


def _rename(element: ET.Element, name: str, variables: Mapping[str, str]) -> None:
    # HTML knows the elements of SVG by their bare names.
    element.tag = _local(element.tag)
    attributes = {_local(key): value for key, value in element.attrib.items()}
    for key, value in attributes.items():
        if key == "id":
            attributes[key] = f"{name}-{value}"
        elif key == "href":
            attributes[key] = f"#{name}-{value.removeprefix('#')}"
        elif "url(#" in value:
            attributes[key] = _REFERENCE.sub(lambda match: f"{name}-{match[0]}", value)
        if key in ("style", "fill", "stroke"):
            attributes[key] = _in_page_colours(_FONT_FAMILY.sub("", attributes[key]), variables)
    # A variable is understood in a style, not in an attribute; what the style says comes last and wins.
    moved = [
        f"{key}: {attributes.pop(key)}" for key in ("fill", "stroke") if "var(" in attributes.get(key, "")
    ]
    if moved:
        attributes["style"] = "; ".join([*moved, attributes.get("style", "")])
    element.attrib = attributes


def _in_page_colours(style: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"#[0-9a-f]{6}", lambda match: variables.get(match[0], match[0]), style)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
