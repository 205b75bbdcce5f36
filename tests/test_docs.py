"""README and docs: printed outputs, the model table and links are correct."""

import re
from pathlib import Path

import pytest

from support.docs_tables import model_table, written_table
from support.pages import blocks, broken_promises, fill_cache, run_block

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_code_prints_what_its_comments_say(tmp_path, monkeypatch):
    """All blocks share one session."""
    monkeypatch.chdir(tmp_path)
    fill_cache(tmp_path, monkeypatch)
    cached = tmp_path / "hub" / "checkpoints" / "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    (tmp_path / cached.name).symlink_to(cached)
    namespace: dict[str, object] = {}
    pairs = [
        pair
        for block in blocks(ROOT / "README.md", "python")
        for pair in run_block(block, "README.md", namespace)
    ]
    assert len(pairs) >= 5
    assert broken_promises(pairs) == []


@pytest.mark.slow
def test_model_table_is_the_counted_one():
    assert written_table() == model_table(), "run `python tests/support/docs_tables.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
