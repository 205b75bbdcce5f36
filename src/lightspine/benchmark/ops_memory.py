"""How much memory a scan takes beyond its inputs, by the high-water mark of a fresh process (Linux).

The mark of resident memory is set back just before the call and read just after it. In that process every
block from 64 KiB up is mapped when it is asked for and unmapped when it is freed, so nothing that an earlier
call left behind is used again unseen, and huge pages are off. The kernels are compiled and have run once. The
system counts pages in lots for each processor, so a difference below `RESOLUTION_BYTES` means nothing.
"""

import ctypes
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightspine.benchmark.ops_cases import ScanCase
from lightspine.errors import LightspineError

RESOLUTION_BYTES = 2**19
_REPEATS = 3
_MAPPED_FROM_BYTES = 2**16
_PR_SET_THP_DISABLE = 41


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


def can_measure_memory() -> bool:
    """Tell whether this system lets a process set its own high-water mark back."""
    return os.access("/proc/self/clear_refs", os.W_OK)


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
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_MAPPED_FROM_BYTES)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
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
            forward.append(_peak_of(operator, *leaves))
        out = operator(*leaves)
        backward.append(_peak_of(torch.autograd.grad, out, leaves, torch.ones_like(out)))
    # The operator over a sequence also hands over the last state.
    state = 0 if case.directions else batch * case.dim * case.state_dim * out.element_size()
    return ScanMemory(
        inputs=sum(_bytes_of(t) for t in leaves),
        outputs=_bytes_of(out) + state,
        # The first call of each is the warm-up.
        forward=int(statistics.median(forward[1:])),
        backward=int(statistics.median(backward[1:])),
    )


def _peak_of(function: Callable[..., object], *arguments: object) -> int:
    """Return by how much the resident memory rose at its highest while the function ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = function(*arguments)
    peak = _status_bytes("VmHWM")
    del result
    return peak - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LightspineError(f"the system does not tell {field} in /proc/self/status")


def _bytes_of(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


if __name__ == "__main__":
    _main(sys.argv[1])
