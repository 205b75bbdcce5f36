"""`python -m lightspine.compat SCRIPT.py ARGS` runs a script with the modules of `install`."""

import argparse
import runpy
import sys
from pathlib import Path

from lightspine.compat.install import install


def main() -> None:
    """Install the modules, say on standard error what they replace, and run the script."""
    parser = argparse.ArgumentParser(
        prog="python -m lightspine.compat",
        description="Run a Python script that imports mamba_ssm, causal_conv1d or selective_scan_cuda on "
        "lightspine's scan, without CUDA.",
    )
    parser.add_argument("--override", action="store_true", help="replace packages that work here, too")
    parser.add_argument("script", metavar="SCRIPT.py", help="the script to run")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    if not Path(options.script).is_file():
        parser.error(f"no such script: {options.script}")
    sys.argv = [options.script, *options.arguments]
    # As Python does for a script: its folder is where its imports are looked up first.
    sys.path[0] = str(Path(options.script).resolve().parent)
    for replacement in install(options.override):
        sys.stderr.write(f"{replacement}\n")
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
