"""Run everything that needs a CUDA device, within six minutes: `python tools/gpu_session.py FOLDER`.

Each step is a process that writes into FOLDER; FOLDER/summary.json lists command, status and seconds of each.
A step that exceeds its time is interrupted, as by Ctrl-C, and killed a few seconds later; the next one runs.
Kernels are compiled anew, into a temporary folder, by the first step, which reports the seconds.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LIMIT_S = 350
# Seconds in which a step that is out of time may write what it has.
GRACE_S = 5.0
MODELS = (
    "vmamba_tiny",
    "timm/swin_tiny_patch4_window7_224",
    "vim_tiny",
    "timm/deit_tiny_patch16_224",
    "shvit_s1",
    "timm/shvit_s1",
    "efficientmod_s",
    "efficientvim_m1",
)
COMPILED = ("vmamba_tiny", "timm/swin_tiny_patch4_window7_224")


class Step(NamedTuple):
    """A command, the most seconds that it may take, and the file for its standard output."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    output: str


def plan_steps(folder: Path) -> list[Step]:
    """Return the steps in the order of their importance."""
    lightspine = (sys.executable, "-m", "lightspine")
    pytest = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "8",
        "-m",
        "gpu",
        f"--junitxml={folder / 'tests.xml'}",
    )
    # Results are saved after each model, so that a step that is ended keeps what it has measured.
    table = (*lightspine, "bench", "--preset", "gpu-table", "--repeats", "20", "--budget", "1")
    return [
        Step("ops", (*lightspine, "bench", "ops", "--device", "cuda", "--json"), 110, "ops.json"),
        Step("tests", pytest, 110, "tests.txt"),
        Step(
            "models",
            (
                *table,
                "--mode",
                "eager,optimized",
                "--only",
                ",".join(MODELS),
                "--out",
                str(folder / "models"),
            ),
            70,
            "models.txt",
        ),
        Step(
            "compiled",
            (
                *table,
                "--mode",
                "compile",
                # Compiling a training step takes longer than this step may.
                "--no-train",
                "--batch",
                "128",
                "--only",
                ",".join(COMPILED),
                "--out",
                str(folder / "compiled"),
            ),
            60,
            "compiled.txt",
        ),
        Step("verify", (*lightspine, "doctor", "--verify", "--json"), LIMIT_S, "verify.json"),
    ]


def run_steps(
    steps: Sequence[Step], folder: Path, limit_s: float, environment: Mapping[str, str]
) -> list[dict[str, object]]:
    """Run the steps one after the other and write the summary after each.

    Args:
        steps: the steps.
        folder: for the outputs and summary.json.
        limit_s: seconds of all steps together.
        environment: variables of the processes.

    Returns:
        The summary: name, command, status ("ok", "failed", "out of time") and seconds of each step.
    """
    summary: list[dict[str, object]] = []
    end = time.monotonic() + limit_s
    for step in steps:
        start = time.monotonic()
        status = _run(step, folder, min(step.limit_s, end - start), environment)
        summary.append(
            {
                "name": step.name,
                "command": " ".join(step.command),
                "status": status,
                "seconds": round(time.monotonic() - start, 1),
            }
        )
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _run(step: Step, folder: Path, limit_s: float, environment: Mapping[str, str]) -> str:
    if limit_s <= 0:
        return "out of time"
    with (folder / step.output).open("w") as out, (folder / f"{step.name}.err.txt").open("w") as err:
        # A session of its own, so that its child processes end with it.
        process = subprocess.Popen(
            step.command, stdout=out, stderr=err, env=dict(environment), start_new_session=True
        )
        try:
            return "failed" if process.wait(limit_s) else "ok"
        except subprocess.TimeoutExpired:
            # As Ctrl-C does: pytest then reports the failures so far, and writes its file.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            return "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main(arguments: Sequence[str]) -> int:
    """Run all steps.

    Returns:
        0 if every step succeeded, 1 if not, 2 without a CUDA device.
    """
    import torch

    if len(arguments) != 1:
        sys.stderr.write("expected one argument, the folder for the results\n")
        return 2
    if not torch.cuda.is_available():
        sys.stderr.write("this machine has no CUDA device: nothing was run\n")
        return 2
    folder = Path(arguments[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "models").exists() or (folder / "compiled").exists():
        sys.stderr.write(f"{folder} already holds results: move or delete it first\n")
        return 2
    with tempfile.TemporaryDirectory() as cache:
        summary = run_steps(plan_steps(folder), folder, LIMIT_S, os.environ | {"TRITON_CACHE_DIR": cache})
    for step in summary:
        sys.stdout.write(f"{step['name']:8}{step['status']:14}{step['seconds']:>8} s\n")
    return int(any(step["status"] != "ok" for step in summary))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
