"""The documentation is true: its code prints what it says, its table is the counted one, its links exist."""

import re
from pathlib import Path

import pytest

from support.docs_tables import model_table, written_table
from support.reference import fill_checkpoint, read_figure, write_official_file

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_readme_code_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """The blocks are one session; a printed shape stands behind its line."""
    monkeypatch.chdir(tmp_path)
    figure = read_figure("vmamba/vmambav2v_tiny")
    write_official_file(
        tmp_path / "vssm1_tiny_0230s_ckpt_epoch_264.pth", fill_checkpoint(figure["checkpoint"])
    )
    namespace: dict[str, object] = {}
    for block in _code_blocks(ROOT / "README.md"):
        exec(compile(block, "README.md", "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        # A promised output stands behind its line, or below it.
        promised = re.findall(r"^print\(.*\)(?:  |\n)# (.+)$", block, flags=re.MULTILINE)
        assert len(printed) == len(promised)
        for line, promise in zip(printed, promised, strict=True):
            assert promise.startswith(line) or not promise.startswith(("torch.Size", "["))


def test_model_table_is_the_counted_one():
    assert written_table() == model_table(), "run `python tests/support/docs_tables.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
