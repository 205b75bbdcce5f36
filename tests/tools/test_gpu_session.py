"""The session on a GPU that `make gpu` runs, with other commands in place of its steps."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightspine.benchmark.presets import find_preset

TOOL = Path(__file__).parents[2] / "tools" / "gpu_session.py"


@pytest.fixture(scope="module")
def session() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_step_that_fails_or_hangs_does_not_stop_the_others(session: ModuleType, tmp_path: Path) -> None:
    def step(name: str, code: str, limit_s: float = 300) -> object:
        return session.Step(name, (sys.executable, "-c", code), limit_s, f"{name}.txt")

    steps = [
        step("fails", "raise SystemExit('broken')"),
        step("hangs", "import time; time.sleep(600)", 0.5),
        step("works", "import os; print(os.environ['WORD'])"),
    ]
    summary = session.run_steps(steps, tmp_path, 1000, os.environ | {"WORD": "hello"})
    assert [entry["status"] for entry in summary] == ["failed", "out of time", "ok"]
    assert (tmp_path / "works.txt").read_text() == "hello\n"
    assert "broken" in (tmp_path / "fails.err.txt").read_text()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_step_that_is_out_of_time_keeps_what_it_writes_when_interrupted(
    session: ModuleType, tmp_path: Path
) -> None:
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("started", flush=True)
    time.sleep(600)
finally:
    print("written")
"""
    step = session.Step("interrupted", (sys.executable, "-S", "-c", code), 1.0, "out.txt")
    [entry] = session.run_steps([step], tmp_path, 1000, os.environ)
    assert entry["status"] == "out of time"
    assert (tmp_path / "out.txt").read_text() == "started\nwritten\n"


def test_no_step_starts_after_the_limit(session: ModuleType, tmp_path: Path) -> None:
    steps = [session.Step("late", (sys.executable, "-c", ""), 10, "late.txt")]
    [entry] = session.run_steps(steps, tmp_path, 0, os.environ)
    assert entry["status"] == "out of time"


def test_session_takes_at_most_six_minutes(session: ModuleType) -> None:
    assert session.LIMIT_S <= 360


def test_models_of_the_session_are_in_the_preset(session: ModuleType, tmp_path: Path) -> None:
    specs = find_preset("gpu-table").specs
    known = {f"timm/{spec.name}" if spec.source == "timm" else spec.name for spec in specs}
    assert known.issuperset(session.MODELS)
    assert known.issuperset(session.COMPILED)
    assert [step.name for step in session.plan_steps(tmp_path)] == [
        "ops",
        "tests",
        "models",
        "compiled",
        "verify",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_status_2(
    session: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session.main([str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
