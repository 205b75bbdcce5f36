"""Read mutated files in child processes with limits: `python -m support.fuzzing FOLDER SEED FORMAT=COUNT...`.

Prints a JSON object: format -> counts of files that were read and refused, and the failures. Each format is
also printed to standard error when it is finished.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from lightspine.models import loading
from lightspine.models.checkpoint import read_checkpoint
from lightspine.models.factory import identify_entry
from support.fuzz_formats import REFUSALS, Format, formats

CASE_SECONDS = 10
"""Processor time of a case; on a busy machine it may last several times as long."""

MEMORY = 2**30
"""Address space of a child in bytes, in addition to that of the imported libraries and the valid files."""

LONG_RUN = 1000
"""Number of cases from which files are also compared with all models."""

CASES_OF_A_CHILD = 1000
"""A new child process is forked after so many cases, so that none depends on thousands before it."""


class TooLongError(BaseException):
    """A case took longer than `CASE_SECONDS`."""


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _stop(*_: Any) -> None:
    raise TooLongError


def _run_cases(form: Format, label: str, folder: Path, cases: range, outcome: dict[str, Any]) -> None:
    """Read mutated files; `outcome` also says which case is being read."""
    _limit()
    signal.signal(signal.SIGPROF, _stop)
    for case in cases:
        (folder / "case").write_text(str(case))
        draw = random.Random(f"{label} {case}")
        content = draw.choice(form.mutations)(draw.choice(form.seeds), draw)
        file = folder / form.name
        file.write_bytes(content)
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        try:
            form.read(file)
            outcome["read"] += 1
        except REFUSALS:
            outcome["refused"] += 1
        except BaseException as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            (folder / f"failure-{case}-{form.name}").write_bytes(content)
            outcome["failures"].append({"case": case, "error": _describe(error)})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _describe(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != "_stop"]
    own = [frame for frame in frames if "lightspine" in frame.filename] or frames
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (frames[-1], own[-1]))
    return f"{type(error).__name__}: {str(error)[:200]} ({places})"


def _run_format(form: Format, label: str, folder: Path, count: int) -> dict[str, Any]:
    """Read `count` files, in child processes that are forked because importing PyTorch takes seconds."""
    form_started = time.monotonic()
    total: dict[str, Any] = {"read": 0, "refused": 0, "failures": []}
    start = 0
    while start < count:
        cases = range(start, min(start + CASES_OF_A_CHILD, count))
        outcome = _run_in_child(form, label, folder, cases)
        for key in ("read", "refused", "failures"):
            total[key] += outcome[key]
        # A child that died has counted neither that case nor those before it.
        start = outcome["next"]
    return total | {"seconds": round(time.monotonic() - form_started, 1)}


def _run_in_child(form: Format, label: str, folder: Path, cases: range) -> dict[str, Any]:
    result, place = folder / "outcome.json", folder / "case"
    for file in (result, place):
        file.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        outcome: dict[str, Any] = {"read": 0, "refused": 0, "failures": [], "next": cases.stop}
        with (folder / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            _run_cases(form, label, folder, cases, outcome)
        except BaseException:
            outcome["failures"].append({"case": "unknown", "error": traceback.format_exc()})
        # The children's limits do not concern the outcome.
        result.write_text(json.dumps(outcome))
        os._exit(0)
    status = _wait(pid, place)
    if result.is_file():
        return json.loads(result.read_text())
    at = int(place.read_text() or cases.start) if place.is_file() else cases.start
    kept = folder / f"death-{at}-{form.name}"
    if (folder / form.name).is_file():
        kept.write_bytes((folder / form.name).read_bytes())
    failure = {"case": at, "error": f"the process ended with status {status}"}
    return {"read": 0, "refused": 0, "failures": [failure], "next": at + 1}


def _wait(pid: int, place: Path) -> int:
    """Wait for a child; kill it if a case does not end, for example because it hangs outside Python."""
    seen, since = "", time.monotonic()
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        now = place.read_text() if place.is_file() else ""
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > 10 * CASE_SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def main() -> None:
    """Run the formats named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("formats", nargs="+")
    args = parser.parse_args()
    counts = {name: int(count) for name, _, count in (entry.partition("=") for entry in args.formats)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    identify = max(counts.values()) >= LONG_RUN
    if identify:
        # The first comparison builds every model, which takes seconds.
        identify_entry(read_checkpoint({"weight": torch.zeros(1)}), "")
    else:
        loading.list_models = lambda: ["shvit_s1"]
    outcomes = {}
    for name, count in counts.items():
        folder = args.folder / name
        folder.mkdir(parents=True)
        form = formats(folder, canary=args.folder / "canary", identify=identify)[name]()
        for seed in form.seeds:
            (folder / form.name).write_bytes(seed)
            if name != "onnx":  # its threads would not survive the fork
                form.read(folder / form.name)
        outcomes[name] = _run_format(form, f"{name} {args.seed}", folder, count)
        sys.stderr.write(f"{name}: {json.dumps(outcomes[name])[:3000]}\n")
        sys.stderr.flush()
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main()
