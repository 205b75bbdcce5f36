"""Compile the Triton kernels of the library for sm_90, without a device, and count their instructions.

    python tools/kernel_report.py [--json]

Each row is one compiled kernel at the shapes of VMamba-T's and Vim-Ti's scans. The columns:

- `instructions`: SASS instructions of the kernel, without padding.
- `instructions_per_step`: instructions that a warp issues per position, direction and 32 channels, prologue
  included. Every instruction counts as often as the loops around it run: loops are backward branches in the
  machine code, their trip counts follow from the arguments of the launch, and a forward branch counts as not
  taken (an upper bound). For the kernels that pass states from chunk to chunk a step is a chunk.
- `registers`, `stack_bytes`, `shared_bytes`: per thread, per thread and per program.
- `compile_s`: seconds from the source to machine code, with an empty cache.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Timings are of a compilation, never of a read from Triton's cache.
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightspine.ops.inputs import CrossScanInputs, SelectiveScanInputs
from lightspine.ops.kernel_scan import KernelScan
from lightspine.ops.triton import conv_launch, cross_scan_launch, launch
from lightspine.ops.triton.scan_backward_kernel import TILE

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VMAMBA_STAGES = {1: (96, 56, 6), 2: (192, 28, 12), 3: (384, 14, 24), 4: (768, 7, 48)}
VIM_CASES = ((197, 128), (1025, 16), (6085, 8), (6085, 1))
BATCH = 128


class NoDevice:
    """Stands for a device that is not there: names the compiler's target, and runs nothing."""

    def get_current_target(self) -> Any:
        """Return the target of an H100."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """Return the number of the stream."""
        return 0


def main(arguments: list[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(arguments)
    rows = report()
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return 0
    names = list(rows[0])
    sys.stdout.write("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|\n")
    for row in rows:
        sys.stdout.write("| " + " | ".join(str(row[name]) for name in names) + " |\n")
    return 0


def report() -> list[dict[str, Any]]:
    """Compile all kernels and return one row for each kernel of each case."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    driver.set_active(NoDevice())
    for case, states, run in _cases():

        def compile_only(
            kernel: Any,
            programs: int,
            *,
            num_warps: int = 1,
            case: str = case,
            state_dim: int = states,
            **arguments: Any,
        ) -> None:
            if arguments.get("ADJOINT"):
                case += ", adjoint"
            if "p_out" in arguments and arguments["p_out"] is None:
                case += ", states of chunks"
            if (kernel.__name__, case) not in rows:
                rows[kernel.__name__, case] = _measure(
                    kernel, case, state_dim, programs, num_warps, arguments
                )

        with _launching(compile_only):
            run()
    driver.set_active(None)
    return list(rows.values())


def _cases() -> Iterator[tuple[str, int, Callable[[], None]]]:
    for stage, (dim, side, rank) in VMAMBA_STAGES.items():
        for dtype in (torch.bfloat16, torch.float32) if stage in (1, 4) else (torch.bfloat16,):
            name = f"VMamba stage {stage}, {str(dtype)[6:]}"
            yield name, 1, lambda dim=dim, side=side, rank=rank, dtype=dtype: _fused(dim, side, rank, dtype)

    for length, batch in VIM_CASES:
        name = f"Vim, L {length}, batch {batch}, bfloat16"
        yield name, 16, lambda length=length, batch=batch: _selective(batch, length)
    yield "Vim, both directions, L 197, batch 128, bfloat16", 16, _bidirectional
    yield "VMamba stage 1 with delta, bfloat16", 1, _cross


def _selective(batch: int, length: int) -> None:
    inputs = _vim_inputs(batch, length, groups=1)
    scan = KernelScan(launch)
    out, state, saved = scan.selective_scan(inputs, True, False, True)
    scan.selective_scan_backward(out, state, inputs, saved, True, False)


def _bidirectional() -> None:
    inputs = _vim_inputs(BATCH, 197, groups=2)
    scan = KernelScan(launch)
    scan.bidirectional_scan_backward(scan.bidirectional_scan(inputs, True), inputs, True)
    x, weight = _empty(BATCH, 197, 384, dtype=torch.bfloat16), _empty(2, 384, 4, dtype=torch.bfloat16)
    out = conv_launch.causal_conv1d(x, weight, weight[..., 0], 0b10, True)
    conv_launch.causal_conv1d_backward(out, x, weight, weight[..., 0], 0b10, True)


def _cross() -> None:
    dim, side, _ = VMAMBA_STAGES[1]
    x = _empty(BATCH, side, side, dim, dtype=torch.bfloat16)
    delta = _empty(BATCH, side, side, 4, dim, dtype=torch.bfloat16)
    B = _empty(BATCH, side, side, 4, 1, dtype=torch.bfloat16)
    inputs = CrossScanInputs(x, delta, _empty(4, dim, 1), B, B, _empty(4, dim), _empty(4, dim))
    scan = KernelScan(launch)
    out, saved = scan.cross_scan(inputs, True, "cross2d", True)
    scan.cross_scan_backward(out, inputs, saved, True, "cross2d")


def _vim_inputs(batch: int, length: int, groups: int) -> SelectiveScanInputs:
    dim, states = 384, 16
    tokens = _empty(batch, length, groups * dim, dtype=torch.bfloat16).transpose(1, 2)
    B = _empty(batch, length, groups, states, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    A, D = _empty(groups * dim, states), _empty(groups * dim)
    return SelectiveScanInputs(tokens, tokens, A, B, B, D, tokens[:, :dim], D)


def _fused(dim: int, side: int, rank: int, dtype: torch.dtype) -> None:
    walk = cross_scan_launch.find_walk("cross2d", side, side, torch.device("meta"))
    inputs = cross_scan_launch.ProjectedInputs(
        _empty(BATCH, side * side, dim, dtype=dtype),
        _empty(BATCH, side * side, 4, rank + 2, dtype=dtype),
        _empty(4, dim, rank, dtype=dtype).transpose(1, 2),
        _empty(4, dim),
        _empty(4, dim),
        _empty(4, dim),
    )
    out, states = cross_scan_launch.cross_scan_forward(inputs, walk, True)
    cross_scan_launch.cross_scan_backward(out, inputs, walk, states)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def _launching(compile_only: Callable[..., None]) -> Iterator[None]:
    modules = (conv_launch, cross_scan_launch, launch)
    before = [module.launch for module in modules]
    for module in modules:
        module.launch = compile_only
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.launch = function


def _measure(
    kernel: Any, case: str, states: int, programs: int, num_warps: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = kernel.warmup(**arguments, num_warps=num_warps, enable_fp_fusion=True, grid=(programs,))
    seconds = time.perf_counter() - start
    sass, usage = _disassemble(compiled.asm["cubin"])
    trips, steps = _trips(kernel.__name__, arguments, num_warps)
    return {
        "kernel": kernel.__name__,
        "case": case,
        "states": states,
        "instructions": len(sass),
        "instructions_per_step": round(_issued(sass, trips) / steps, 1),
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": compiled.metadata.shared,
        "compile_s": round(seconds, 1),
    }


def _trips(kernel: str, arguments: dict[str, Any], num_warps: int) -> tuple[list[int], float]:
    """Return how often the loops of a kernel run, from the outermost in, and the steps of one warp."""
    if kernel.startswith("causal_conv1d"):
        groups = arguments["groups"] if "bwd" in kernel else 1
        return [groups], groups * arguments["BLOCK_T"] * arguments["BLOCK_D"] / 32 / num_warps
    chunks = arguments["chunks"]
    if kernel == "state_passing_kernel":
        return [-(-chunks // arguments["BLOCK_J"])], chunks
    if kernel in ("chunk_scan_fwd_kernel", "chunk_scan_bwd_kernel", "chunk_adjoint_kernel"):
        positions = min(arguments["chunk"], arguments["length"])
        trips = [positions]
        if "bwd" in kernel:
            stretch = arguments["STRETCH"]
            trips = [-(-positions // stretch), stretch // TILE.value]
        return trips, positions * arguments["BLOCK_D"] / 32 / num_warps
    if "chunk" not in arguments:
        return [-(-chunks // arguments["T"])], chunks
    # A chunk in the middle of a sequence; the last one may be shorter.
    positions = min(arguments["chunk"], arguments["length"])
    images = arguments.get("images")
    trips = [arguments["count"], -(-positions // cross_scan_launch.TILE)]
    if images is not None:
        trips = [trips[0], images, trips[1], 2]
    return trips, positions * arguments["VEC"] * arguments["count"] * (images or 1)


def _disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """Return the instructions with their addresses, and the resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run(
                [BINARIES / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-sass", "--dump-resource-usage")
        )
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]
    return instructions, {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}


def _issued(sass: list[tuple[int, str]], trips: list[int]) -> float:
    """Return how many instructions a warp issues."""
    last = sass[-1][0]
    loops = []
    for address, text in sass:
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address <= last:
            loops.append((int(target[1], 16), address))
    total = 0
    for address, _ in sass:
        factor = 1
        for trip in trips[: sum(start <= address <= end for start, end in loops)]:
            factor *= trip
        total += factor
    return total


if __name__ == "__main__":
    sys.exit(main())
