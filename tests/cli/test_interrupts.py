"""Ctrl-C in a terminal: SIGINT to all processes of a command, which then ends with one sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.checkpoints import save_small
from support.images import COLOURS, write_folder
from support.processes import ROOT

pytestmark = pytest.mark.slow

SCRIPT = str(ROOT / "tests" / "support" / "command.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and 1,800 images."""
    folder = tmp_path_factory.mktemp("interrupts")
    save_small(folder / "model.safetensors", classes=list(COLOURS))
    write_folder(folder / "images", count=600)
    return folder


def _start(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [found for child in children for found in _descendants(child)]


def _starts_rank(pid: int) -> bool:
    """Whether a process has started another rank; git, which is asked for the commit, is none."""
    try:
        return any(SCRIPT in Path(f"/proc/{child}/cmdline").read_text() for child in _descendants(pid))
    except OSError:
        return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _signal_when(
    process: "subprocess.Popen[str]",
    condition: Callable[[], bool],
    number: signal.Signals = signal.SIGINT,
    *,
    alone: bool = False,
) -> list[str]:
    """Send a signal once a condition holds; return the messages after every process has ended."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    others = _descendants(process.pid)
    (os.kill if alone else os.killpg)(process.pid, number)
    _, error = process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in others):
        assert time.monotonic() < deadline, f"{others} outlive {process.pid}"
        time.sleep(0.05)
    assert "Traceback" not in error
    lines = [line.strip() for line in error.replace("\r", "\n").splitlines()]
    # A benchmark warns of other processes.
    return [line for line in lines if re.match("lightspine: (?!warning)", line)]


def test_interrupted_training_resumes(place: Path) -> None:
    folder = place / "run"
    train = ("train", "--config", "image_folder", "--data.root", place / "images", "--size", "32")
    short = ("--model.model", "shvit_s1", "--data.num_workers", "2", "--trainer.limit_val_batches", "1")
    files = ("--folder", folder, "--save-every-steps", "2", "--batch-size", "8")
    process = _start(*train, *short, *files, "--epochs", "50")
    said = _signal_when(process, (folder / "last.ckpt").exists)
    assert process.returncode == 130
    last = folder / "last.ckpt"
    assert said == [
        f"lightspine: training was interrupted; the last checkpoint is {last}; resume with --resume {last}"
    ]
    limits = ("--trainer.max_steps", "6", "--trainer.limit_train_batches", "6")
    resumed = _start(*train, *short, *files, "--epochs", "50", *limits, "--resume", last)
    _, error = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, error
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["predict", "embed", "evaluate"])
def test_interrupted_work_over_images_says_so(place: Path, command: str) -> None:
    out = place / command
    model = (
        (place / "model.safetensors",)
        if command == "embed"
        else ("--checkpoint", place / "model.safetensors")
    )
    process = _start(
        *(command, *model, "--data", place / "images"),
        *("--workers", "2", "--out", out, "--batch-size", "8"),
    )
    # The two processes that load images.
    said = _signal_when(process, lambda: len(_descendants(process.pid)) == 2)
    assert process.returncode == 130
    assert said == ["lightspine: interrupted"]


@pytest.mark.parametrize("arguments", [("bench", "vmamba_tiny", "--batch", "8"), ("export",)])
def test_interrupted_bench_and_export_say_so(place: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    out = tmp_path / "model.onnx"
    more = (place / "model.safetensors", out) if arguments == ("export",) else ("--out", tmp_path / "bench")
    process = _start(*arguments, *more)
    # Imported, and then at work.
    said = _signal_when(process, lambda: _cpu_seconds(process.pid) > 8)
    assert process.returncode == 130
    assert said == ["lightspine: interrupted"]
    assert not out.exists()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("alone", [False, True], ids=["all", "rank 0"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_ranks_are_connected_ends_them(
    tmp_path: Path, number: signal.Signals, alone: bool
) -> None:
    process = _start(
        *("train", "--config=digits_shvit_s1", "--trainer.accelerator=cpu", "--trainer.devices=2"),
        *("--folder", tmp_path / "run"),
    )
    # Rank 0 waits for rank 1, which is being imported.
    said = _signal_when(process, lambda: _starts_rank(process.pid), number, alone=alone)
    assert process.returncode == 128 + number
    assert said == [
        f"lightspine: training was interrupted by {number.name} before its ranks were connected; "
        "stopping this rank"
    ]


def test_interrupted_ranks_end_at_the_same_step(tmp_path: Path) -> None:
    last = tmp_path / "run" / "last.ckpt"
    process = _start(
        *("train", "--config=digits_shvit_s1", "--trainer.accelerator=cpu", "--trainer.devices=2"),
        *("--epochs", "50", "--save-every-steps", "2", "--folder", tmp_path / "run"),
    )
    said = _signal_when(process, last.exists)
    assert process.returncode == 130
    assert said == [
        f"lightspine: training was interrupted; the last checkpoint is {last}; resume with --resume {last}"
    ]
