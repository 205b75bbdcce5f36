"""Peak CPU memory of each benchmark row, measured in a process of its own (Linux).

A server process imports everything and forks one process per row. A row then needs no imports, starts
with the same memory as every other row, and cannot end the benchmark if it crashes or runs out of memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from lightspine.benchmark.model_specs import ModelSpec
from lightspine.benchmark.peak_rss import disable_huge_pages, measuring_environment, peak_rss_bytes
from lightspine.benchmark.prepare import TrainingStep, prepare_row
from lightspine.benchmark.results import Row, Status
from lightspine.benchmark.settings import Job
from lightspine.errors import LightspineError
from lightspine.utils.resource_errors import is_out_of_memory

_MIB = 2**20
_MAX_ERROR_LENGTH = 300


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Peak memory of a row, or the reason why it failed.

    Attributes:
        status: "ok", "failed" or "out_of_memory".
        error: the reason, unless the status is "ok".
        forward_mib: peak of a forward pass, including the weights.
        train_mib: peak of a training step, including weights and optimizer state.
        train_failure: status and reason if only the training step failed.
    """

    status: Status = "ok"
    error: str | None = None
    forward_mib: float | None = None
    train_mib: float | None = None
    train_failure: tuple[Status, str] | None = None


def describe_failure(error: BaseException) -> tuple[Status, str]:
    """Return the status of a row whose measurement raised `error`, and the reason in one line."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return "out_of_memory", _truncate(text) or "the process could not allocate memory"
    return "failed", _truncate(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _truncate(text: str) -> str:
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[: _MAX_ERROR_LENGTH - 3]}..."


class MemoryServerError(LightspineError):
    """The server process ended, independently of the row."""


class MemoryServer:
    """Client of the server process; created by `memory_server`."""

    def __init__(self, process: subprocess.Popen[str], stderr: Any):
        self._process, self._stderr = process, stderr

    def measure(self, job: Job, onnx_file: Path | None, *, train: bool) -> MemoryReading:
        """Measure a row in a new process.

        Raises:
            MemoryServerError: the server process ended.
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
            self._stderr.seek(0)
            last = self._stderr.read().strip().splitlines()[-1:] or ["no message"]
            raise MemoryServerError(f"the process that measures memory has ended: {last[0]}")
        return _parse_answer(json.loads(answer))


@contextmanager
def memory_server() -> Iterator[MemoryServer]:
    """Start the server process and kill it at the end of the block."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightspine.benchmark.memory"],
            env=measuring_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            yield MemoryServer(process, stderr)
        finally:
            process.kill()
            # Closing the pipe flushes it, which fails if the process has not read everything.
            with suppress(BrokenPipeError):
                process.communicate()


def _parse_answer(answer: dict[str, Any]) -> MemoryReading:
    if "signal" in answer:
        # Linux's out-of-memory killer sends signal 9.
        if answer["signal"] == 9:
            return MemoryReading(status="out_of_memory", error="killed by the system's out-of-memory killer")
        return MemoryReading(status="failed", error=f"the process ended with signal {answer['signal']}")
    if "error" in answer:
        return MemoryReading(status=answer["status"], error=answer["error"])
    return MemoryReading(
        forward_mib=answer["forward"] / _MIB,
        train_mib=None if answer["train"] is None else answer["train"] / _MIB,
        train_failure=tuple(answer["train_failure"]) if "train_failure" in answer else None,
    )


def run_server() -> None:
    """Read one request per line from standard input and answer with one line; runs in the server process.

    The server itself runs no model, because a forked child does not have the threads of its parent.
    """
    disable_huge_pages()
    answers = os.fdopen(os.dup(1), "w")
    # Redirect what libraries print, so that it does not mix with the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_measure_in_fork(json.loads(line))) + "\n")
        answers.flush()


def _measure_in_fork(request: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        with os.fdopen(write_end, "w") as pipe:
            _answer_request(request, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    answer: dict[str, Any] = json.loads(text)
    return answer


def _answer_request(request: dict[str, Any], pipe: TextIO) -> None:
    # When memory runs out, the kernel should kill this process and not the one with the results.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        answer = _measure_request(request)
    except Exception as error:
        status, reason = describe_failure(error)
        answer = {"status": status, "error": reason}
    json.dump(answer, pipe)


def _measure_request(request: dict[str, Any]) -> dict[str, Any]:
    spec = ModelSpec(**request["spec"] | {"published": None})
    row = Row(**request["row"] | {"published": None})
    torch.set_num_threads(row.threads)
    onnx_file = None if request["onnx_file"] is None else Path(request["onnx_file"])
    job = Job(spec=spec, row=row)
    if row.mode in ("eager", "optimized"):
        # The first pass in a process loads code from disk and starts threads, so a first copy of the model
        # runs unmeasured. The second copy is measured in its first pass, in which it may pack weights.
        prepare_row(job, None, train=False).forward()
    prepared = prepare_row(job, onnx_file, train=request["train"])
    if row.mode == "compile":
        # Compilation takes far more memory than a pass.
        prepared.forward()
    forward = prepared.held_bytes + peak_rss_bytes(prepared.forward)
    return {"forward": forward, **_measure_training(prepared.train_step)}


def _measure_training(step: TrainingStep | None) -> dict[str, Any]:
    """Measure the second training step; the first one allocates the optimizer state."""
    if step is None:
        return {"train": None}
    try:
        step()
        return {"train": step.held_bytes + peak_rss_bytes(step)}
    except Exception as error:
        return {"train": None, "train_failure": describe_failure(error)}


if __name__ == "__main__":
    run_server()
