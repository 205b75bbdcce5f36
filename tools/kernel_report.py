"""Compile the Triton kernels of VMamba's scan for sm_90, without a device, and count its instructions.

    python tools/kernel_report.py [--json]

Each row is one compiled kernel at the shapes of VMamba-T's scans. The columns:

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

from lightspine.ops.triton import cross_scan_launch

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VMAMBA_STAGES = {1: (96, 56, 6), 2: (192, 28, 12), 3: (384, 14, 24), 4: (768, 7, 48)}
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
            states: int = states,
            **arguments: Any,
        ) -> None:
            if arguments.get("ADJOINT"):
                case += ", adjoint"
            if (kernel.__name__, case) not in rows:
                rows[kernel.__name__, case] = _measure(kernel, case, states, programs, num_warps, arguments)

        with _launching(compile_only):
            run()
    driver.set_active(None)
    return list(rows.values())


def _cases() -> Iterator[tuple[str, int, Callable[[], None]]]:
    for stage, (dim, side, rank) in VMAMBA_STAGES.items():
        for dtype in (torch.bfloat16, torch.float32) if stage in (1, 4) else (torch.bfloat16,):
            name = f"VMamba stage {stage}, {str(dtype)[6:]}"
            yield name, 1, lambda dim=dim, side=side, rank=rank, dtype=dtype: _fused(dim, side, rank, dtype)


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
    before = cross_scan_launch.launch
    cross_scan_launch.launch = compile_only
    try:
        yield
    finally:
        cross_scan_launch.launch = before


def _measure(
    kernel: Any, case: str, states: int, programs: int, num_warps: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = kernel.warmup(**arguments, num_warps=num_warps, enable_fp_fusion=True, grid=(programs,))
    seconds = time.perf_counter() - start
    sass, usage = _disassemble(compiled.asm["cubin"])
    trips, steps = _trips(arguments)
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


def _trips(arguments: dict[str, Any]) -> tuple[list[int], float]:
    """Return how often the loops of a kernel run, from the outermost in, and the steps of one warp."""
    chunks = arguments["chunks"]
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
