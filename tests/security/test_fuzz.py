"""Mutated files of every format: each is read or refused with a LightspineError, and none runs code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.pages import ROOT

FORMATS = ("safetensors", "pth", "pth-legacy", "recipe", "coco", "png", "jpeg", "shard")
CASES = 60
MANY_CASES = 10_000


def _fuzz(folder: Path, count: int, seed: int, *formats: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzzing", str(folder), str(count), str(seed), *formats],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _check(folder: Path, outcome: dict[str, Any]) -> None:
    assert outcome["failures"] == []
    # A fuzzer whose files are all read, or all refused, tests nothing.
    assert min(outcome["read"], outcome["refused"]) > 0
    assert not (folder / "canary").exists()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All formats from one process, because importing PyTorch takes longer than the cases."""
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, _fuzz(folder, CASES, 0, *FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_file_is_read_or_refused(fuzzed: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, outcomes = fuzzed
    _check(folder, outcomes[name])


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    _check(tmp_path, _fuzz(tmp_path, MANY_CASES, 1, name)[name])
