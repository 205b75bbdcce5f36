"""The folder of a run, and the checkpoint in it to go on from."""

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from lightspine.errors import LightspineError, UsageError
from lightspine.training.checkpoints import LAST

AUTO = "auto"
"""Value of `resume`: go on from the folder's checkpoint, or begin if it has none."""


def prepare_folder(folder: str | Path, *, resume: str | Path | None = None) -> Path:
    """Return the folder of a run, which is made.

    Args:
        folder: the wanted one; with another run's files in it, `folder-2`, `folder-3`, ... is taken.
        resume: a checkpoint, whose folder is the run's; or "auto": then it is `folder` whatever is in it.
    """
    if resume is not None and resume != AUTO:
        return Path(resume).resolve().parent
    path = Path(folder)
    # The other processes of a distributed run come later than the first and are told its folder.
    if resume is None and getattr(rank_zero_only, "rank", 0) == 0:
        path = _free_neighbour(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def find_checkpoint(folder: Path, resume: str | Path | None, max_epochs: int | None) -> Path | None:
    """Return the checkpoint that `resume` means, or None where the run begins.

    Args:
        folder: of the run.
        resume: a path, "auto" or None.
        max_epochs: epochs that the run shall have in the end.

    Raises:
        UsageError: no such file, or it has all epochs behind it (with "auto" such a run is only exported).
        LightspineError: the file is no checkpoint.
    """
    if resume is None:
        return None
    path = folder / LAST if resume == AUTO else Path(resume)
    if resume == AUTO and not path.exists():
        return None
    if not path.is_file():
        raise UsageError(f"expected a checkpoint to resume from, but {path} is not a file")
    done = _finished_epochs(path)
    if resume != AUTO and max_epochs is not None and 0 <= max_epochs <= done:
        raise UsageError(
            f"expected more epochs to train, but {path} was already trained for {done} of {max_epochs} epochs"
        )
    return path


def _finished_epochs(path: Path) -> int:
    try:
        # Mapped: only the few numbers that are looked at are read.
        loops = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["loops"]
        return int(loops["fit_loop"]["epoch_progress"]["current"]["processed"])
    # torch's unpickler raises nearly anything on bytes that are no checkpoint.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LightspineError(f"cannot resume from {path}: {reason}") from error


def _free_neighbour(wanted: Path) -> Path:
    path, number = wanted, 2
    while path.exists() and (not path.is_dir() or any(path.iterdir())):
        path = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return path
