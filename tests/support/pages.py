"""The pages of the documentation and what is printed in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    """Return a page's path from the root, for the name of a test."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language; "" for those that name none."""
    return [text for name, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(page: Path) -> list[str]:
    """Return the lines of a page that call `lightspine`, without what explains them behind two spaces."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [re.split(r" {2,}", line)[0] for line in lines if line.startswith("lightspine ")]
