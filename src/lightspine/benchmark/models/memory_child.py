"""The process that forks one for each row: run by `lightspine.benchmark.models.memory` as a program."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from lightspine.benchmark.models.failures import describe_failure
from lightspine.benchmark.models.prepare import TrainingStep, prepare
from lightspine.benchmark.models.settings import Job
from lightspine.benchmark.models.specs import ModelSpec
from lightspine.benchmark.resident import peak_bytes_of, start_measuring
from lightspine.benchmark.results import Row


def main() -> None:
    """Answer each line of the standard input, a row, with a line about its memory.

    Nothing is computed in this process: threads that are there already do not survive a fork.
    """
    start_measuring()
    answers = os.fdopen(os.dup(1), "w")
    # What a library prints belongs to nobody's answer.
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_in_a_fork(json.loads(line))) + "\n")
        answers.flush()


def _in_a_fork(request: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            _answer(request, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    answer: dict[str, Any] = json.loads(said)
    return answer


def _answer(request: dict[str, Any], pipe: TextIO) -> None:
    _offer_to_be_ended()
    try:
        answer = _measure(request)
    except Exception as error:
        status, sentence = describe_failure(error)
        answer = {"status": status, "error": sentence}
    json.dump(answer, pipe)


def _offer_to_be_ended() -> None:
    # When memory runs out the kernel ends this process, not the one with the results.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    # What is published stays behind: nothing here reads it.
    spec = ModelSpec(**request["spec"] | {"published": None})
    row = Row(**request["row"] | {"published": None})
    torch.set_num_threads(row.threads)
    onnx_file = None if request["onnx_file"] is None else Path(request["onnx_file"])
    job = Job(spec=spec, row=row)
    if row.mode in ("eager", "optimized"):
        # The first pass of a process also reads code from the disk and makes threads. Not this copy's is
        # measured but the next one's, which lays out weights for the processor anew where the model does so.
        prepare(job, None, train=False).forward()
    prepared = prepare(job, onnx_file, train=request["train"])
    if row.mode == "compile":
        # Compiling takes far more than running.
        prepared.forward()
    forward = prepared.held_bytes + peak_bytes_of(prepared.forward)
    return {"forward": forward, **_measure_training(prepared.train_step)}


def _measure_training(step: TrainingStep | None) -> dict[str, Any]:
    """Measure a step after the first, in which the optimiser makes its state; a failure is a result too."""
    if step is None:
        return {"train": None}
    try:
        step()
        return {"train": step.held_bytes + peak_bytes_of(step)}
    except Exception as error:
        return {"train": None, "train_failure": describe_failure(error)}


if __name__ == "__main__":
    main()
