"""CPU kernel cache: compiled code is discarded when a source file of the kernels changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightspine.ops.cpu

# Runs one of the kernels' helper functions, compiled and cached like a kernel.
PROBE = """
import logging
import numpy as np
from lightspine.ops.cpu.cache import kernel
from lightspine.ops.cpu.simd import load, store
from lightspine.ops.cpu.vector_math import sigmoid


@kernel
def probe(x, out):
    store(out, 0, sigmoid(load(x, 0, 16)), 16)


if __name__ == "__main__":
    from lightspine.ops.cpu.probe import probe

    logging.basicConfig(level=logging.INFO)
    out = np.zeros(16, np.float32)
    probe(np.zeros(16, np.float32), out)
    print(out[0], sum(probe.stats.cache_hits.values()))
"""


def run_probe(package: Path) -> tuple[float, int, int]:
    """Return the sigmoid of 0 and the numbers of cache hits and of messages about compiling."""
    done = subprocess.run(
        [sys.executable, "-m", "lightspine.ops.cpu.probe"],
        env=os.environ | {"PYTHONPATH": str(package), "NUMBA_CACHE_DIR": str(package / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    value, hits = done.stdout.split()
    return float(value), int(hits), done.stderr.count("compiling the CPU kernel probe")


def test_edit_of_a_helper_compiles_the_kernels_again_and_says_so(tmp_path: Path) -> None:
    cpu = tmp_path / "lightspine" / "ops" / "cpu"
    shutil.copytree(
        Path(lightspine.ops.cpu.__file__).parent, cpu, ignore=shutil.ignore_patterns("__pycache__")
    )
    for folder in (cpu.parents[1], cpu.parent):
        (folder / "__init__.py").touch()
    (cpu / "probe.py").write_text(PROBE)
    assert run_probe(tmp_path) == (0.5, 0, 1)
    assert run_probe(tmp_path) == (0.5, 1, 0)

    helper = cpu / "vector_math.py"
    before = "return where_negative(x, small, 1.0) / (1.0 + small)"
    assert helper.read_text().count(before) == 1
    helper.write_text(helper.read_text().replace(before, "return x + 3.0"))
    assert run_probe(tmp_path) == (3.0, 0, 1)
    assert run_probe(tmp_path) == (3.0, 1, 0)
