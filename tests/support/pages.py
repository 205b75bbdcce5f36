"""Documentation pages: code blocks, commands and promised outputs."""

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from support.reference import fill_checkpoint, read_figure, write_official_file

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    """Return a page's path relative to the repository, as a test id."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a language; "" for blocks without one."""
    return [text for name, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(page: Path) -> list[str]:
    """Return the `lightspine` commands of a page, without the explanation after two spaces."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [re.split(r" {2,}", line)[0] for line in lines if line.startswith("lightspine ")]


def promised_output(block: str, statement: ast.stmt) -> str | None:
    """Return the expected output: the comment after a statement or in the lines below it."""
    lines = block.splitlines()
    _, mark, comment = lines[(statement.end_lineno or 0) - 1][statement.end_col_offset or 0 :].partition("# ")
    found = [comment] if mark else []
    for line in lines[statement.end_lineno or 0 :]:
        if (found and mark) or not line.startswith("# "):
            break
        found.append(line.removeprefix("# "))
    return "\n".join(found) or None


def run_block(block: str, name: str, namespace: dict[str, Any]) -> list[tuple[str, str]]:
    """Run a block and return (printed, promised) for every print with an output comment."""
    pairs = []
    for statement in ast.parse(block).body:
        code = compile(ast.Module([statement], type_ignores=[]), name, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, namespace)
        if block.splitlines()[statement.lineno - 1].startswith("print("):
            promise = promised_output(block, statement)
            if promise is not None:
                pairs.append((output.getvalue().strip(), promise))
    return pairs


def broken_promises(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs that differ; an explanation may follow the output after a colon."""
    return [
        (printed, promise)
        for printed, promise in pairs
        if promise != printed and not promise.startswith(f"{printed}: ")
    ]


def fill_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the published file of vmamba_tiny, with filled tensors, into a cache of its own: no download."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    name = "vssm1_tiny_0230s_ckpt_epoch_264.pth"
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    layout = read_figure("vmamba/vmambav2v_tiny")["checkpoint"]
    write_official_file(folder / "hub" / "checkpoints" / name, fill_checkpoint(layout))
