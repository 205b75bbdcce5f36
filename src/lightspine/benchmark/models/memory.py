"""The peak memory of each row on a CPU, in processes of their own, before any row runs here.

A process that has only imported everything forks one for each row (Linux), so that a row costs no imports,
one model's memory never hides another's, and a model that breaks, or takes more than there is, breaks nothing
else.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightspine.benchmark.models.settings import Job
from lightspine.benchmark.resident import measuring_environment
from lightspine.benchmark.results import Status
from lightspine.errors import LightspineError

_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """What a row took in its own process, or why it could not run there.

    Attributes:
        status: "ok", "failed" or "out_of_memory".
        error: one sentence, unless it is "ok".
        forward_mib: peak of a forward pass with its weights.
        train_mib: peak of a training step with weights and optimiser.
        train_failure: status and sentence of a training step that failed where the forward pass did not.
    """

    status: Status = "ok"
    error: str | None = None
    forward_mib: float | None = None
    train_mib: float | None = None
    train_failure: tuple[Status, str] | None = None


class MemoryServerError(LightspineError):
    """The process that forks one for each row has ended: no fault of the row."""


class MemoryServer:
    """Asks the forking process, one row at a time; made by `memory_server`."""

    def __init__(self, process: subprocess.Popen[str], complaints: Any):
        self._process, self._complaints = process, complaints

    def measure(self, job: Job, onnx_file: Path | None, *, train: bool) -> MemoryReading:
        """Run a row in a new process.

        Raises:
            MemoryServerError: the forking process itself has ended.
        """
        request = {
            "spec": asdict(job.spec),
            "row": asdict(job.row),
            "onnx_file": None if onnx_file is None else str(onnx_file),
            "train": train,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._complaints.seek(0)
            last = self._complaints.read().strip().splitlines()[-1:] or ["it said nothing"]
            raise MemoryServerError(f"the process that measures memory has ended: {last[0]}")
        return _as_reading(json.loads(answer))


@contextmanager
def memory_server() -> Iterator[MemoryServer]:
    """Start the forking process; it ends with the block, also in the midst of a row."""
    command = [sys.executable, "-m", "lightspine.benchmark.models.memory_child"]
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command,
            env=measuring_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        try:
            yield MemoryServer(process, complaints)
        finally:
            process.kill()
            # What it has not read any more cannot be written on closing.
            with suppress(BrokenPipeError):
                process.communicate()


def _as_reading(answer: dict[str, Any]) -> MemoryReading:
    if "signal" in answer:
        # The kernel ends what takes the last memory with signal 9.
        if answer["signal"] == 9:
            return MemoryReading(status="out_of_memory", error="the system ended the process for its memory")
        return MemoryReading(status="failed", error=f"the process ended with signal {answer['signal']}")
    if "error" in answer:
        return MemoryReading(status=answer["status"], error=answer["error"])
    return MemoryReading(
        forward_mib=answer["forward"] / _MIB,
        train_mib=None if answer["train"] is None else answer["train"] / _MIB,
        train_failure=tuple(answer["train_failure"]) if "train_failure" in answer else None,
    )
