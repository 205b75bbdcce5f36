"""tools/install.py: the messages of pip go to a log, and a failure keeps its exit status."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "install.py"


def install(folder: Path, program: str) -> "subprocess.CompletedProcess[str]":
    """Run the script with a program in place of pip."""
    command = [
        sys.executable,
        str(SCRIPT),
        str(folder / "log" / "install.log"),
        sys.executable,
        "-c",
        program,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_warnings_go_to_the_log_alone(tmp_path: Path) -> None:
    program = "import sys; print('Collecting timm'); print('WARNING: no matter', file=sys.stderr)"
    run = install(tmp_path, program)
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(r"installed in \d:\d\d; all messages are in .*install\.log\n", run.stdout)
    log = (tmp_path / "log" / "install.log").read_text()
    assert sorted(log.splitlines()) == ["Collecting timm", "WARNING: no matter"]


def test_failure_is_told_with_its_errors_and_status(tmp_path: Path) -> None:
    run = install(tmp_path, "print('ERROR: No matching distribution found for tim'); raise SystemExit(3)")
    assert run.returncode == 3
    assert run.stdout == ""
    first, second = run.stderr.splitlines()
    assert first == "ERROR: No matching distribution found for tim"
    assert second.startswith("the installation failed; all messages are in ")


def test_steps_are_shown_without_paths_and_lists_of_packages() -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from install import shorten
    finally:
        sys.path.pop(0)
    assert (
        shorten("  Downloading https://host/torch-2.14.whl (800 MB)\n")
        == "Downloading torch-2.14.whl (800 MB)"
    )
    assert shorten("Installing collected packages: numpy, torch, timm\n") == "Installing 3 packages"
