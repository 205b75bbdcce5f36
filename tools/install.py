"""Install packages with pip, without its messages: shows what is done, and writes all output to a log file.

    python tools/install.py LOG PYTHON -m pip install ...

In a terminal one line shows the current step and the time; otherwise a line is printed every ten seconds. If
pip fails, its errors and the path of the log are printed, and the exit status is that of pip.
"""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_STEPS = re.compile(
    r"\s*(Collecting|Downloading|Building|Preparing|Installing|Obtaining|Processing|Using cached)\b"
)
_EVERY_SECONDS = 10


def main(log: str, command: list[str]) -> int:
    """Run the command; return its exit status."""
    started = time.monotonic()
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Bars would write control characters to the log.
    process = subprocess.Popen(
        [*command, "--progress-bar", "off"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    display = Display(started)
    errors = []
    with path.open("w") as file:
        for line in process.stdout:
            file.write(line)
            if _STEPS.match(line):
                display.step = shorten(line)
            elif line.startswith("ERROR"):
                errors.append(line.rstrip())
    status = process.wait()
    display.close()
    if status == 0:
        spent = format_time(time.monotonic() - started)
        sys.stdout.write(f"installed in {spent}; all messages are in {path}\n")
    else:
        errors.append(f"the installation failed; all messages are in {path}")
        sys.stderr.write("\n".join(errors) + "\n")
    return status


class Display:
    """Shows the current step until it is closed."""

    def __init__(self, started: float) -> None:
        self.step = "starting"
        self._started = started
        self._closed = threading.Event()
        self._terminal = sys.stdout.isatty()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the line from a terminal."""
        self._closed.set()
        self._thread.join()
        if self._terminal:
            sys.stdout.write("\r\x1b[2K")

    def _run(self) -> None:
        for _ in self._ticks():
            text = f"{format_time(time.monotonic() - self._started)}  {self.step}"
            sys.stdout.write(f"\r\x1b[2K{text}" if self._terminal else f"{text}\n")
            sys.stdout.flush()

    def _ticks(self) -> Iterator[None]:
        while not self._closed.wait(0.5 if self._terminal else _EVERY_SECONDS):
            yield


def shorten(line: str) -> str:
    """Shorten a line of pip: no path of a file, and the number of packages in place of all their names."""
    words = line.split()
    if words[:3] == ["Installing", "collected", "packages:"]:
        return f"Installing {len(words) - 3} packages"
    return " ".join(words[:1] + [word.rpartition("/")[2] or word for word in words[1:]])[:100]


def format_time(seconds: float) -> str:
    """Return "1:23"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
