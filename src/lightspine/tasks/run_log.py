"""What a run leaves behind besides its weights: numbers per epoch as CSV, curves, lines on the screen."""

import csv
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightspine.tasks.base import LightspineTask

CURVES = (("train_loss", "val_loss"), ("val_top1", "val_top5"), ("lr",))
_LABELS = {"train_loss": "loss", "val_top1": "accuracy (%)", "lr": "learning rate"}


class RunLog(pl.Callback):
    """Keeps one row of numbers per epoch, in `metrics.csv` and inside every checkpoint.

    Because the rows travel in the checkpoint, a resumed run goes on with the file where it was left.
    (Lightning's CSVLogger deletes the rows that are there.)

    Args:
        folder: where `metrics.csv` and `curves.png` are written.
        announce: write a line per epoch to the standard error, for a run without a progress bar.

    Attributes:
        rows: epoch, seconds, every metric that the task logs and the steps that were skipped so far, per
            finished epoch.
    """

    def __init__(self, folder: Path, *, announce: bool = False) -> None:
        self.folder = folder
        self.announce = announce
        self.rows: list[dict[str, float]] = []
        self._started = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Take the folder of the first process, the only one that chooses it."""
        self.folder = Path(trainer.strategy.broadcast(os.fspath(self.folder)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the clock of an epoch that is resumed in its middle."""
        self._started = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: LightspineTask) -> None:  # type: ignore[override]  # the only kind of module here
        """Write the row of the epoch."""
        # The training loss of the epoch is known only now; the validation's numbers are from before.
        row = {"epoch": float(trainer.current_epoch), "seconds": time.perf_counter() - self._started}
        row |= {name: value.item() for name, value in trainer.callback_metrics.items()}
        row["skipped_steps"] = float(pl_module.guard.skipped)
        self.rows.append(row)
        if trainer.is_global_zero:
            write_rows(self.folder / "metrics.csv", self.rows)
            if self.announce:
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
                sys.stderr.write(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {numbers}\n")
                sys.stderr.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Write rows as CSV in one step: a reader never meets half a file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    part = path.with_suffix(".part")
    part.write_text(text.getvalue())
    part.replace(path)


def plot_curves(path: Path, rows: list[dict[str, float]], title: str) -> None:
    """Draw loss, accuracy and learning rate over the epochs into a PNG file."""
    # The figure is built without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, names in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for name in names:
            points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(_LABELS[names[0]])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)
