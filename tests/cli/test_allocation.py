"""`keep_freed_memory`: resident memory after tensors are freed."""

import os
import subprocess
import sys

import pytest

from lightspine.utils.allocation import ALLOCATOR_VARIABLES

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
RESIDENT = """
import numpy as np, re, pathlib
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
def left_behind():
    before = resident()
    blocks = [np.ones(12_000_000, np.float32) for _ in range(4)]
    del blocks
    return (resident() - before) / 4 / 48_000
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc alone is told"
)


def run(script: str, **variables: str) -> str:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=ENVIRONMENT | variables, capture_output=True, text=True, check=True)
    return done.stdout.strip().rpartition("\n")[2]


def test_freed_blocks_stay_with_the_process() -> None:
    keep = "from lightspine import keep_freed_memory; assert keep_freed_memory()\n"
    assert float(run(f"{RESIDENT}\nprint(left_behind())")) < 0.1
    assert float(run(f"{RESIDENT}\n{keep}\nprint(left_behind())")) > 0.7


def test_what_the_environment_says_stands() -> None:
    script = "from lightspine import keep_freed_memory; print(keep_freed_memory())"
    assert run(script, MALLOC_TRIM_THRESHOLD_="100000") == "False"


@pytest.mark.parametrize(("arguments", "kept"), [("", "True"), ("['recipes', 'digits']", "False")])
def test_program_keeps_it_and_a_call_does_not(arguments: str, kept: str) -> None:
    script = (
        "import sys; sys.argv = ['lightspine', 'recipes', 'digits']\n"
        "from lightspine_cli.main import main\n"
        "from lightspine.utils.allocation import keeps_freed_memory\n"
        f"assert main({arguments}) == 0; print(keeps_freed_memory())"
    )
    assert run(script) == kept
