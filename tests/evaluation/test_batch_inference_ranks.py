"""Batch inference with several ranks and killed processes, through the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.checkpoints import save_small
from support.images import COLOURS, write_folder

COUNT = 400
PROGRAM = (sys.executable, "-m", "lightspine")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and 1,200 images, of which two are bad."""
    folder = tmp_path_factory.mktemp("processes")
    save_small(folder / "model.safetensors", classes=list(COLOURS))
    images = write_folder(folder / "images", count=COUNT)
    for name in ("blue/7.jpg", "red/300.jpg"):
        (images / name).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> bytes:
    """Predictions of an uninterrupted run."""
    subprocess.run([*_command(place, "whole")], check=True, env=_env(), capture_output=True)
    return (place / "whole" / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_whole_run_has_every_image_once(place: Path, whole: bytes) -> None:
    paths = [line.split(b",")[0] for line in whole.splitlines()[1:]]
    assert len(set(paths)) == len(paths) == 3 * COUNT - 2
    bad = (place / "whole" / "bad_images.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in bad[1:]] == ["blue/7.jpg", "red/300.jpg"]


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["workers", "devices"])
def test_killed_run_resumes_to_the_same_bytes(place: Path, whole: bytes, sharing: str) -> None:
    out = f"killed-{sharing}"
    command = _command(place, out, f"--{sharing}", "2")
    process = subprocess.Popen(command, env=_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _wait_for_parts(place / out, 5)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (place / out / "run.json").exists()
    _wait_until_gone(workers)
    subprocess.run([*command, "--resume"], check=True, env=_env(), capture_output=True)
    outcome = json.loads((place / out / "run.json").read_text())
    assert 0 < outcome["computed"] < outcome["images"] == 3 * COUNT
    assert (place / out / "predictions.csv").read_bytes() == whole
    assert {path.name for path in (place / out).iterdir()} == {
        ".lock",
        "predictions.csv",
        "bad_images.csv",
        "run.json",
    }


@pytest.mark.slow
def test_killed_worker_ends_the_run_with_a_sentence(place: Path, whole: bytes) -> None:
    command = _command(place, "worker", "--devices", "2")
    process = subprocess.Popen(command, env=_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _wait_for_parts(place / "worker", 5)
    os.kill(_ranks(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(rb"rank \d was killed by SIGKILL; finished parts are kept", error)
    subprocess.run([*command, "--resume"], check=True, env=_env(), capture_output=True)
    assert (place / "worker" / "predictions.csv").read_bytes() == whole


@pytest.mark.slow
def test_rank_that_hangs_is_named(place: Path) -> None:
    command = _command(place, "hang", "--devices", "2", "--rank-timeout", "5")
    process = subprocess.Popen(command, env=_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _wait_for_parts(place / "hang", 2)
    os.kill(_ranks(process)[1], signal.SIGSTOP)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert b"rank 1 of 2 has not answered for 5 seconds; finished parts are kept" in error
    assert len(_sentences(error)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("connected", [False, True], ids=["connecting", "computing"])
@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "the run was ended by SIGTERM; finished parts are kept: resume the run to continue"),
    ],
)
def test_signal_to_all_processes_ends_them_with_one_sentence(
    place: Path, number: signal.Signals, sentence: str, connected: bool
) -> None:
    out = f"signal-{number}-{connected}"
    command = _command(place, out, "--devices", "2", "--workers", "1")
    process = subprocess.Popen(
        command, env=_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    while len(_ranks(process)) < 2:
        time.sleep(0.05)
    if connected:
        _wait_for_parts(place / out, 2)
    started = _ranks(process)
    # As a terminal does at Ctrl-C.
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert _sentences(error) == [f"lightspine: {sentence}"]
    assert b"Traceback" not in error
    _wait_until_gone(started)


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(place: Path, whole: bytes) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [*torchrun, *_command(place, "torchrun")[1:]]
    done = subprocess.run(command, env=_env(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "torchrun" / "predictions.csv").read_bytes() == whole
    assert json.loads((place / "torchrun" / "run.json").read_text())["devices"] == 2


def _ranks(process: "subprocess.Popen[bytes]") -> list[int]:
    return [pid for pid in _children(process.pid) if b"spawn_main" in _command_line(pid)]


def _sentences(error: bytes) -> list[str]:
    """Return the messages on standard error; progress bars are redrawn behind a carriage return."""
    lines = [line.strip() for line in error.decode().replace("\r", "\n").splitlines()]
    return [line for line in lines if line.startswith("lightspine:")]


def _command(place: Path, out: str, *more: str) -> list[str]:
    files = ["--checkpoint", str(place / "model.safetensors"), "--data", str(place / "images")]
    # Many small parts, so that the kill interrupts the run.
    return [*PROGRAM, "predict", *files, "--out", str(place / out), "--part-size", "8", *more]


def _env() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def _wait_for_parts(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 400
    while len(list((folder / "parts").glob("*.csv"))) < count:
        assert time.monotonic() < deadline, f"no {count} parts in {folder}"
        time.sleep(0.005)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} outlive their parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        # A zombie has ended, but its parent has not waited for it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
