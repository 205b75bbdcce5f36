"""How much memory a scan takes beyond its inputs, by the high-water mark of a fresh process (Linux).

`lightspine.benchmark.resident` says how it is read. The kernels are compiled and have run once.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lightspine.benchmark.ops_cases import ScanCase
from lightspine.benchmark.resident import measuring_environment, peak_bytes_of, start_measuring
from lightspine.errors import LightspineError

_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class ScanMemory:
    """Bytes of one scan.

    Attributes:
        inputs: size of all inputs.
        outputs: size of what the forward returns.
        forward: peak of the forward pass above what was there before, its outputs included.
        backward: peak of the backward pass above what was there before (inputs, output and its gradient), the
            gradients of all inputs included.
    """

    inputs: int
    outputs: int
    forward: int
    backward: int


def measure_scan_memory(
    jobs: Sequence[tuple[ScanCase, int]], threads: int
) -> Iterator[tuple[ScanCase, int, ScanMemory]]:
    """Measure the scans, one after the other, in a process of their own.

    Args:
        jobs: shapes and batches.
        threads: number of torch threads.

    Yields:
        Shape, batch and result, as soon as it is there.

    Raises:
        LightspineError: the process failed.
    """
    work = {"threads": threads, "jobs": [[dataclasses.asdict(case), batch] for case, batch in jobs]}
    command = [sys.executable, "-m", "lightspine.benchmark.ops_memory", json.dumps(work)]
    with subprocess.Popen(
        command, env=measuring_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for (case, batch), line in zip(jobs, process.stdout, strict=False):
            yield case, batch, ScanMemory(**json.loads(line))
        complaint = process.stderr.read()
    if process.returncode:
        last = complaint.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise LightspineError(f"the process that measures memory failed: {last[0]}")


def _main(work: str) -> None:
    start_measuring()
    settings = json.loads(work)
    torch.set_num_threads(settings["threads"])
    for case, batch in settings["jobs"]:
        result = _measure(ScanCase(**case), batch)
        sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
        sys.stdout.flush()


def _measure(case: ScanCase, batch: int) -> ScanMemory:
    operator = case.operator("auto")
    leaves = [t.detach().requires_grad_() for t in case.inputs(batch)]
    forward, backward = [], []
    for _ in range(1 + _REPEATS):
        with torch.no_grad():
            forward.append(peak_bytes_of(operator, *leaves))
        out = operator(*leaves)
        backward.append(peak_bytes_of(torch.autograd.grad, out, leaves, torch.ones_like(out)))
    # The operator over a sequence also hands over the last state.
    state = 0 if case.directions else batch * case.dim * case.state_dim * out.element_size()
    return ScanMemory(
        inputs=sum(_bytes_of(t) for t in leaves),
        outputs=_bytes_of(out) + state,
        # The first call of each is the warm-up.
        forward=int(statistics.median(forward[1:])),
        backward=int(statistics.median(backward[1:])),
    )


def _bytes_of(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


if __name__ == "__main__":
    _main(sys.argv[1])
