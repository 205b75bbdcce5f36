"""Mutated files of every format: each is read or refused with a LightspineError, and none runs code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.pages import ROOT

# The quick ones first. In a short run each has enough cases to be read and to be refused.
FORMATS = {
    "class-mapping": 40,
    "image-list": 40,
    "index": 40,
    "coco": 60,
    "shard": 60,
    "png": 60,
    "jpeg": 60,
    "images": 60,
    "label-map": 60,
    "onnx": 40,
    "results": 20,
    "weights-index": 20,
    "local-dir": 20,
    "safetensors": 40,
    "pth": 20,
    "pth-legacy": 20,
    "recipe": 20,
}
MANY_CASES = 10_000


def _fuzz(folder: Path, counts: dict[str, int], seed: int) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    formats = [f"{name}={count}" for name, count in counts.items()]
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzzing", str(folder), str(seed), *formats],
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
    return folder, _fuzz(folder, FORMATS, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_file_is_read_or_refused(fuzzed: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, outcomes = fuzzed
    _check(folder, outcomes[name])


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    _check(tmp_path, _fuzz(tmp_path, {name: MANY_CASES}, 1)[name])
