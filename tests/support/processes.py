"""Run `lightspine train` in subprocesses."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train_command(
    folder: Path, *flags: str, launcher: tuple[str, ...] = (), timeout_s: float = 150
) -> subprocess.CompletedProcess[str]:
    """Train a small model on a few batches of the digits and wait for all processes."""
    script = str(ROOT / "tests" / "support" / "command.py")
    quick = ["--data=DigitsDataModule", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
    limits = ["--trainer.limit_train_batches=8", "--trainer.limit_val_batches=2"]
    # The callbacks of `support.interruption`.
    limits.append("--trust-class-path=support")
    return subprocess.run(
        [sys.executable, *launcher, script, "train", *quick, *limits, "--folder", str(folder), *flags],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path]), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def kill_at(step: int, *, rank: int = 0) -> list[str]:
    """Return the flags that make a rank kill itself with SIGKILL after a step."""
    return [
        "--trainer.callbacks+=support.interruption.KillAtStep",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.rank={rank}",
    ]
