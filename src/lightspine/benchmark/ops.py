"""Benchmark of the scan operators on a CPU: time, peak memory, share of a model's forward pass."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import lightspine
from lightspine.benchmark.interleaved_timing import Timing, time_interleaved
from lightspine.benchmark.ops_cases import ScanCase
from lightspine.benchmark.peak_rss import (
    can_measure_memory,
    disable_huge_pages,
    measuring_environment,
    peak_rss_bytes,
)
from lightspine.benchmark.profiling import measure_operators
from lightspine.benchmark.saved_activations import count_saved_bytes
from lightspine.benchmark.system import describe_system, load_average
from lightspine.blocks import VimBlock, VSSBlock
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.devices import torch_threads

PARTS = ("time", "memory", "models")
SHARE_MODELS = ("vmamba_tiny", "vim_tiny")

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
TORCH_FORWARD, TORCH_FORWARD_BACKWARD = "torch forward", "torch forward+backward"
REFERENCE_FORWARD = "reference forward"
ELEMENTWISE = "elementwise"

_MEMORY_REPEATS = 3
_BLOCK_SIDE = 14


@dataclass(frozen=True, kw_only=True)
class ScanMemory:
    """Memory of one scan in bytes.

    Attributes:
        inputs: size of all inputs.
        outputs: size of the outputs of the forward pass.
        forward: peak of the forward pass above the memory before it; includes the outputs.
        backward: peak of the backward pass above the memory before it (which holds inputs, output and its
            gradient); includes the gradients of all inputs.
    """

    inputs: int
    outputs: int
    forward: int
    backward: int


@dataclass(kw_only=True)
class OpsRow:
    """Measurements of one shape at one batch size.

    Attributes:
        case: the shape.
        batch: batch size.
        times: see `time_scan`; empty if time was not measured.
        memory: `None` if memory was not measured.
    """

    case: ScanCase
    batch: int
    times: dict[str, Timing] = field(default_factory=dict)
    memory: ScanMemory | None = None


@dataclass(frozen=True, kw_only=True)
class ScanShare:
    """Time of a model's forward pass and of the scans in it, under PyTorch's profiler.

    Attributes:
        forward_ms: forward pass in milliseconds.
        scan_ms: all scans in it, in milliseconds.
        share: scans divided by forward pass, 0 to 1.
    """

    forward_ms: float
    scan_ms: float
    share: float


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Bytes per token that a float32 block saves for its backward pass.

    Attributes:
        block: the block with its width.
        saved: with `recompute=False`.
        recomputed: with `recompute=True`.
        default: "saved" or "recomputed", the default of the library.
    """

    block: str
    saved: float
    recomputed: float
    default: str


@dataclass(frozen=True, kw_only=True)
class OpsReport:
    """The result of `measure_ops`.

    Attributes:
        system: see `describe_system`.
        threads: torch threads.
        repeats: timed calls of each function; slow functions have fewer.
        load_before: load average of the minute before; `None` if the system has none.
        rows: one per shape and batch size.
        shares: share of the scans in the forward pass, by model, at batch 1 and 224 pixels.
        saved: activations saved for the backward pass.
    """

    system: dict[str, Any]
    threads: int
    repeats: int
    load_before: float | None
    rows: list[OpsRow]
    shares: dict[str, ScanShare]
    saved: list[SavedActivations]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def measure_ops(
    cases: Sequence[ScanCase],
    batches: Sequence[int],
    *,
    threads: int | None = None,
    repeats: int = 15,
    parts: Sequence[str] = PARTS,
    on_step: Callable[[str], None] = lambda _: None,
) -> OpsReport:
    """Measure the scans on the CPU.

    Args:
        cases: the shapes.
        batches: batch sizes.
        threads: number of torch threads during the measurement; unchanged by default.
        repeats: timed calls of each function, and at most ten profiled passes of each model.
        parts: subset of `PARTS`: "time" and "memory" of the scans (memory on Linux only), and "models":
            share of the scans in whole models and activations saved by their blocks.
        on_step: called with a short text after each of `count_steps` steps.

    Raises:
        UsageError: an unknown part, or a batch, `repeats` or `threads` that is not positive.
        LightspineError: the process that measures memory failed.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"expected parts from {', '.join(PARTS)}, got {', '.join(unknown)}")
    numbers = [*batches, repeats, *([] if threads is None else [threads])]
    if min(numbers) < 1:
        raise UsageError(f"batches, repeats and threads must be at least 1, got {min(numbers)}")
    load = load_average()
    rows = {(case.name, batch): OpsRow(case=case, batch=batch) for batch in batches for case in cases}
    shares: dict[str, ScanShare] = {}
    saved: list[SavedActivations] = []
    with torch_threads(threads):
        system = describe_system()
        if "models" in parts:
            saved = list(_measure_saved_activations())
            for name in SHARE_MODELS:
                images = torch.randn(1, 3, 224, 224)
                shares[name] = measure_scan_share(
                    lightspine.create_model(name), images, repeats=min(repeats, 10)
                )
                on_step(name)
        if "memory" in parts and can_measure_memory():
            jobs = [(row.case, row.batch) for row in rows.values()]
            for case, batch, memory in measure_scan_memory(jobs, torch.get_num_threads()):
                rows[case.name, batch].memory = memory
                on_step(f"memory of {case.name}, batch {batch}")
        if "time" in parts:
            for row in rows.values():
                row.times = time_scan(row.case, row.batch, repeats)
                on_step(f"time of {row.case.name}, batch {row.batch}")
        used_threads = torch.get_num_threads()
    return OpsReport(
        system=system,
        threads=used_threads,
        repeats=repeats,
        load_before=load,
        rows=list(rows.values()),
        shares=shares,
        saved=saved,
    )


def count_steps(cases: Sequence[ScanCase], batches: Sequence[int], parts: Sequence[str]) -> int:
    """Return the number of calls of `on_step` by `measure_ops`."""
    scans = len(cases) * len(batches)
    memory = scans if "memory" in parts and can_measure_memory() else 0
    return memory + scans * ("time" in parts) + len(SHARE_MODELS) * ("models" in parts)


def time_scan(case: ScanCase, batch: int, repeats: int) -> dict[str, Timing]:
    """Time a scan and the functions it is compared with, interleaved.

    Args:
        case: the shape.
        batch: batch size.
        repeats: timed calls of each function.

    Returns:
        Timings by name: `FORWARD` and `FORWARD_BACKWARD` with backend "auto", `TORCH_FORWARD` with backend
        "torch", and `ELEMENTWISE`, see `ScanCase.elementwise`. At batch 1 also the slow
        `TORCH_FORWARD_BACKWARD` and `REFERENCE_FORWARD`.
    """
    inputs = case.inputs(batch)
    functions = {
        FORWARD: case.forward("auto", inputs),
        ELEMENTWISE: case.elementwise(batch),
        TORCH_FORWARD: case.forward("torch", inputs),
        FORWARD_BACKWARD: case.forward_backward("auto", inputs),
    }
    if batch == 1:
        functions[TORCH_FORWARD_BACKWARD] = case.forward_backward("torch", inputs)
        functions[REFERENCE_FORWARD] = case.forward("reference", inputs)
    return time_interleaved(functions, repeats=repeats)


def measure_scan_share(model: nn.Module, images: Tensor, *, repeats: int = 5, warmup: int = 2) -> ScanShare:
    """Profile forward passes on a CPU and return the share of the scans; sets the model to eval mode."""
    model.eval()
    with torch.inference_mode():
        for _ in range(warmup):
            model(images)
        times = measure_operators(partial(model, images), repeats=repeats, device="cpu")
    return ScanShare(forward_ms=times.run_ms, scan_ms=times.scan_ms, share=times.scan_share)


def measure_scan_memory(
    jobs: Sequence[tuple[ScanCase, int]], threads: int
) -> Iterator[tuple[ScanCase, int, ScanMemory]]:
    """Measure the peak memory of scans in a separate process (Linux only).

    Args:
        jobs: shapes and batch sizes.
        threads: number of torch threads.

    Yields:
        The shape, batch size and memory of each job, in order.

    Raises:
        LightspineError: the process failed.
    """
    work = {"threads": threads, "jobs": [[asdict(case), batch] for case, batch in jobs]}
    command = [sys.executable, "-m", "lightspine.benchmark.ops", json.dumps(work)]
    with subprocess.Popen(
        command, env=measuring_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for (case, batch), line in zip(jobs, process.stdout, strict=False):
            yield case, batch, ScanMemory(**json.loads(line))
        stderr = process.stderr.read()
    if process.returncode:
        last = stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise LightspineError(f"the process that measures memory failed: {last[0]}")


def _run_memory_worker(work: str) -> None:
    """Print one line of JSON for each job; the entry point of the separate process."""
    disable_huge_pages()
    settings = json.loads(work)
    torch.set_num_threads(settings["threads"])
    for case, batch in settings["jobs"]:
        result = _peak_memory_of_scan(ScanCase(**case), batch)
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
        sys.stdout.flush()


def _peak_memory_of_scan(case: ScanCase, batch: int) -> ScanMemory:
    operator = case.operator("auto")
    leaves = [t.detach().requires_grad_() for t in case.inputs(batch)]
    forward, backward = [], []
    for _ in range(1 + _MEMORY_REPEATS):
        with torch.no_grad():
            forward.append(peak_rss_bytes(operator, *leaves))
        out = operator(*leaves)
        backward.append(peak_rss_bytes(torch.autograd.grad, out, leaves, torch.ones_like(out)))
    # The selective scan also returns the last state.
    state = 0 if case.directions else batch * case.dim * case.state_dim * out.element_size()
    return ScanMemory(
        inputs=sum(t.nbytes for t in leaves),
        outputs=out.nbytes + state,
        # The first call compiles the kernels.
        forward=int(statistics.median(forward[1:])),
        backward=int(statistics.median(backward[1:])),
    )


def _measure_saved_activations() -> Iterator[SavedActivations]:
    blocks: list[tuple[str, int, Callable[[bool], nn.Module], str]] = [
        ("VimBlock(192), Vim-Ti", 192, lambda recompute: VimBlock(192, recompute=recompute), "recomputed"),
        ("VimBlock(384), Vim-S", 384, lambda recompute: VimBlock(384, recompute=recompute), "recomputed"),
        ("VSSBlock(96), VMamba-T", 96, lambda recompute: VSSBlock(96, ssm_recompute=recompute), "saved"),
    ]
    for name, dim, build, default in blocks:
        saved, recomputed = (_saved_bytes_per_token(build, recompute, dim) for recompute in (False, True))
        yield SavedActivations(block=name, saved=saved, recomputed=recomputed, default=default)


def _saved_bytes_per_token(build: Callable[[bool], nn.Module], recompute: bool, dim: int) -> float:
    images = torch.randn(1, dim, _BLOCK_SIDE, _BLOCK_SIDE)
    one, two = (nn.Sequential(*(build(recompute) for _ in range(depth))) for depth in (1, 2))
    # The difference is one block including the residual stream at its input.
    return (count_saved_bytes(two, images) - count_saved_bytes(one, images)) / _BLOCK_SIDE**2


if __name__ == "__main__":
    _run_memory_worker(sys.argv[1])
