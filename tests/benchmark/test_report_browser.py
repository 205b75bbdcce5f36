"""The HTML page of `lightspine report` in a real browser."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightspine.benchmark.report import write_report
from lightspine.benchmark.results import save_results
from support.bench_results import sizes_result, table_result
from support.browser import open_in_browser

# One probe for all tests, because starting a browser is slow.
PROBE = """
  const table = page.querySelectorAll("table.sortable")[0];
  const headings = [...table.tHead.rows[1].cells];
  const place = headings.findIndex((heading) => heading.textContent === "median ms");
  const values = () => [...table.tBodies[0].rows].map((row) => row.cells[place].dataset.sort ?? "");
  headings[place].querySelector("button").click();
  const up = values();
  headings[place].querySelector("button").click();
  const box = (element) => element.getBoundingClientRect();
  const wide = (element) => box(element).right > inner.innerWidth + 0.5;
  const letters = [...page.querySelectorAll(".chart svg")].flatMap((svg) => {
    const scale = box(svg).width / svg.viewBox.baseVal.width;
    return [...svg.querySelectorAll("text")].map((text) => {
      return parseFloat(inner.getComputedStyle(text).fontSize) * scale;
    });
  });
  return {
    scroll: page.documentElement.scrollWidth,
    view: inner.innerWidth,
    tooWide: [...page.querySelectorAll("figure, .chart, .box, pre, h1, h2, h3, p, dl")].filter(wide).length,
    charts: [...page.querySelectorAll(".chart svg")].filter((svg) => box(svg).width).length,
    letters: Math.min(...letters),
    ground: inner.getComputedStyle(page.body).backgroundColor,
    words: inner.getComputedStyle(page.querySelector("svg text")).fill,
    up: up,
    down: values(),
    order: headings[place].getAttribute("aria-sort"),
  };
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    save_results(table_result(modes=["eager"]), folder / "table")
    save_results(sizes_result(), folder / "sizes")
    return write_report([folder / "table", folder / "sizes"], folder / "out").page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def visit(page: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the probe's result for a width and color scheme; cached."""
    seen: dict[tuple[int, bool], tuple[dict[str, Any], list[str]]] = {}

    def look(width: int, *, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
        if (width, dark) not in seen:
            folder: Path = tmp_path_factory.mktemp("browser")
            seen[width, dark] = open_in_browser(page, folder, width=width, probe=PROBE, dark=dark)
        return seen[width, dark]

    return look


@pytest.mark.parametrize("width", [390, 1280])
def test_page_does_not_scroll_sideways(visit: Any, width: int) -> None:
    found, _ = visit(width)
    assert found["view"] == width
    assert found["scroll"] <= width
    assert found["tooWide"] == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_charts_are_shown(visit: Any, width: int) -> None:
    found, _ = visit(width)
    assert found["charts"] > 3


@pytest.mark.parametrize("width", [390, 1280])
def test_letters_in_charts_are_large_enough_to_read(visit: Any, width: int) -> None:
    found, _ = visit(width)
    assert found["letters"] >= 8.5


def test_console_says_nothing(visit: Any) -> None:
    _, console = visit(390)
    assert console == []


def test_heading_sorts_its_column_by_number(visit: Any) -> None:
    found, _ = visit(1280)
    up = [float(value) for value in found["up"] if value]
    assert up == sorted(up)
    assert [float(value) for value in found["down"] if value] == sorted(up, reverse=True)
    # Rows without a time come last in both sort orders.
    assert (found["up"][-1], found["down"][-1]) == ("", "")
    assert found["order"] == "descending"


def test_dark_scheme_turns_ground_and_letters_of_charts(visit: Any) -> None:
    light, dark = (visit(1280, dark=dark)[0] for dark in (False, True))
    brightness = [
        sum(json.loads(scheme[what].removeprefix("rgb").replace("(", "[").replace(")", "]")))
        for scheme in (light, dark)
        for what in ("ground", "words")
    ]
    ground, words, dark_ground, dark_words = brightness
    assert ground > 600 > 200 > words
    assert dark_words > 600 > 200 > dark_ground
