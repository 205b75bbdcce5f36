"""HTML parser for tests: elements, attributes and table texts."""

from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Cell:
    """One cell of a table."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class ReadPage(HTMLParser):
    """Parsed HTML page.

    Attributes:
        tags: how many elements there are of each name.
        attributes: every attribute, as name and value.
        ids: every identifier.
        text: all text outside of scripts and styles.
        tables: the rows of each table.
    """

    tags: Counter[str] = field(default_factory=Counter)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    text: str = ""
    tables: list[list[list[Cell]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record an element."""
        values = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.attributes += values.items()
        self._open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(Cell(tag, values))

    def handle_endtag(self, tag: str) -> None:
        """Close an element and its unclosed children."""
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Record text."""
        if "script" in self._open[-1:] or "style" in self._open[-1:]:
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1].text += data


def read_page(page: str) -> ReadPage:
    """Parse an HTML page."""
    found = ReadPage()
    found.feed(page)
    return found
