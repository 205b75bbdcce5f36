"""Lock of an output folder: one process at a time, and none of a dead process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightspine.errors import LightspineError
from lightspine.utils import folder_lock
from lightspine.utils.folder_lock import lock_folder

HOLD = """
import sys, time
from pathlib import Path
from lightspine.utils.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_folder_of_a_living_process_is_refused_and_that_of_a_killed_one_is_not(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.1)
    with (
        pytest.raises(LightspineError, match=f"another process is writing to {tmp_path}"),
        lock_folder(tmp_path),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lock_folder(tmp_path):
        pass


def test_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_folder(tmp_path):
            pass


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LightspineError, match="cannot write"), lock_folder(tmp_path / "file"):
        pass


def test_link_in_place_of_the_lock_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / folder_lock.LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(LightspineError, match="is a link: remove it"), lock_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "keep"
