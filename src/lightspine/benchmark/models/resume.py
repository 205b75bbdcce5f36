"""Going on with an interrupted run, where it is the same run on the same machine."""

from pathlib import Path
from typing import Any

from lightspine.benchmark.results import RESULTS_NAME, BenchResult, load_results
from lightspine.benchmark.system import describe_system
from lightspine.errors import UsageError

_SAME_SYSTEM = ("platform", "processor", "processors_usable", "devices", "versions")


def start_or_resume(
    folder: Path | None, *, resume: bool, command: list[str], preset: str | None, settings: dict[str, Any]
) -> BenchResult:
    """Return the result so far, or an empty one.

    Raises:
        UsageError: the folder holds a result and `resume` is not asked for, or one that was measured in
            another way or elsewhere.
        LightspineError: its file is damaged.
    """
    fresh = BenchResult(
        command=command, preset=preset, settings=settings, system=describe_system(), matmul_gflops={}
    )
    if folder is None:
        if resume:
            raise UsageError("expected --out with the folder of the run to resume")
        return fresh
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected a folder to write to, got the file {folder}")
    if not (folder / RESULTS_NAME).exists():
        return fresh
    if not resume:
        raise UsageError(
            f"{folder} already holds a result: --resume goes on with it, another --out starts anew"
        )
    found = load_results(folder)
    _check_same({"preset": found.preset} | found.settings, {"preset": preset} | settings, folder)
    _check_same(found.system, fresh.system, folder, _SAME_SYSTEM)
    return found


def _check_same(
    found: dict[str, Any], wanted: dict[str, Any], folder: Path, names: tuple[str, ...] | None = None
) -> None:
    for name in names or tuple(dict.fromkeys((*found, *wanted))):
        if found.get(name) != wanted.get(name):
            raise UsageError(
                f"the run in {folder} was measured with {name} {_shown(found.get(name))}, "
                f"not {_shown(wanted.get(name))}: it cannot go on with that"
            )


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
