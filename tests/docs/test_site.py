"""The documentation site builds without warnings, matches the model registry and is self-contained."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightspine
from lightspine.models import get_record
from support.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


@pytest.mark.parametrize("family", sorted({get_record(name).family for name in lightspine.list_models()}))
def test_page_of_a_family_lists_its_members(site: Path, family: str) -> None:
    text = (site / "families" / f"{family}.html").read_text()
    members = [name for name in lightspine.list_models() if get_record(name).family == family]
    assert [name for name in members if f"<code>{name}</code>" not in text] == []


def test_no_table_was_left_out(site: Path) -> None:
    marks = r"<!-- (?:variants|recipes|choosing|measured)"
    assert [page.name for page in _pages(site) if re.search(marks, page.read_text())] == []


def test_every_page_has_its_words_in_the_search(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text()
    assert [word for word in ("cross_scan", "layer_decay", "create_detector") if word not in index] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]+src="(https?:)?//|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(https?:)?//'
    )
    assert [page.name for page in _pages(site) if loads.search(page.read_text())] == []


def test_drawings_are_those_of_the_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "docs" / "_drawings"), str(tmp_path)], check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in (ROOT / "docs" / "drawings").glob("*.svg")}
