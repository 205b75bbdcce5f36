"""A model family registered outside the package, as documented, works in every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.pages import ROOT, blocks

MODULE, USE, FORM = blocks(ROOT / "docs" / "families" / "adding.md", "python")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the module of the page, installed like a pip package."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "tinynet.py").write_text(MODULE)
    record = folder / "tinynet-0.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: tinynet\nVersion: 0.1\n")
    (record / "entry_points.txt").write_text("[lightspine.families]\ntinynet = tinynet\n")
    return folder


def _python(package: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def _lightspine(package: Path, cwd: Path, *arguments: str) -> str:
    code = "import sys; from lightspine_cli.main import main; sys.exit(main())"
    done = _python(package, cwd, "-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_code_of_the_page_runs(package: Path, tmp_path: Path) -> None:
    done = _python(package, tmp_path, "-c", f"import torch\n{USE}\n{FORM}")
    assert done.returncode == 0, done.stderr


def test_commands_know_the_family(package: Path, tmp_path: Path) -> None:
    assert "tinynet" in _lightspine(package, tmp_path, "list", "tiny*")
    assert json.loads(_lightspine(package, tmp_path, "info", "tinynet", "--json"))["params"] == 17_944


@pytest.mark.slow
def test_family_is_exported(package: Path, tmp_path: Path) -> None:
    _lightspine(package, tmp_path, "export", "tinynet", "tinynet.onnx")
    assert (tmp_path / "tinynet.onnx").stat().st_size > 4 * 17_944


@pytest.mark.slow
def test_family_is_trained(package: Path, tmp_path: Path) -> None:
    recipe = ["--config", "digits_shvit_s1", "--model.model", "tinynet", "--model.model_args", "null"]
    short = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--folder", "run"]
    assert "tinynet" in _lightspine(package, tmp_path, "train", *recipe, *short)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_family_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    record = tmp_path / "broken-0.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (record / "entry_points.txt").write_text("[lightspine.families]\nbroken = no_such_module\n")
    done = _python(tmp_path, tmp_path, "-c", "import lightspine")
    assert "the family 'broken' of another package cannot be imported from no_such_module" in done.stderr
