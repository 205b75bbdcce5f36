"""What a run leaves behind besides its weights: numbers per epoch as CSV, curves, lines on the screen."""

import csv
import io
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from lightspine.errors import UsageError
from lightspine.training.base import LightspineTask
from lightspine.utils.devices import peak_memory_mib
from lightspine.utils.files import atomic_write_text

_log = logging.getLogger(__name__)

_LABELS = {"val_top1": "accuracy (%)", "lr": "learning rate"}


class RunLog(pl.Callback):
    """Keeps one row of numbers per epoch, in `metrics.csv` and inside every checkpoint.

    Because the rows travel in the checkpoint, a resumed run goes on with the file where it was left.
    (Lightning's CSVLogger deletes the rows that are there.)

    Args:
        folder: where `metrics.csv` and `curves.png` are written.
        announce: write a line per epoch to the standard error, for a run without a progress bar.

    Attributes:
        rows: per finished epoch: epoch, seconds, every metric that the task logs, `data_share` (of the time
            of the steps that they waited for their batch), `peak_mib` (memory of the process, of the device
            on a GPU, so far) and the steps that were skipped so far.
    """

    def __init__(self, folder: Path, *, announce: bool = False) -> None:
        self.folder = folder
        self.announce = announce
        self.rows: list[dict[str, float]] = []
        self._started = 0.0
        self._validated = False
        self._waiting = DataTimer()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Take the folder of the first process, the only one that chooses it."""
        self.folder = Path(trainer.strategy.broadcast(os.fspath(self.folder)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the clocks of an epoch that is resumed in its middle."""
        self._start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the clocks."""
        self._start()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Note when a batch has come."""
        self._waiting.batch_came()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Note when the next one is asked for."""
        self._waiting.batch_done()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Stop the clock of the steps."""
        self._waiting.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Remember that the epoch has a validation."""
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: LightspineTask) -> None:  # type: ignore[override]  # the only kind of module here
        """Write the row of the epoch."""
        # The training loss of the epoch is known only now; the validation's numbers are from before.
        row = {"epoch": float(trainer.current_epoch), "seconds": time.perf_counter() - self._started}
        # Lightning keeps the numbers of the last validation, however long ago it was.
        row |= {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if self._validated or not name.startswith("val_")
        }
        row["data_share"] = self._waiting.share()
        peak = peak_memory_mib(pl_module.device)
        if peak is not None:
            row["peak_mib"] = peak
        row["skipped_steps"] = float(pl_module.guard.skipped)
        self.rows.append(row)
        if trainer.is_global_zero:
            write_rows(self.folder / "metrics.csv", self.rows)
            if self.announce:
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
                sys.stderr.write(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {numbers}\n")
                sys.stderr.flush()

    def _start(self) -> None:
        self._started = time.perf_counter()
        self._validated = False
        self._waiting = DataTimer()

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Write rows to a CSV file atomically."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def plot_curves(
    path: Path, rows: list[dict[str, float]], title: str, curves: tuple[tuple[str, ...], ...]
) -> None:
    """Draw metrics over the epochs into a PNG file.

    Args:
        path: the file.
        rows: what `RunLog` has written.
        title: of the figure.
        curves: names of the metrics that share a diagram.
    """
    # The figure is built without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, names in zip(figure.subplots(1, len(curves)), curves, strict=True):
        for name in names:
            points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(_LABELS.get(names[0], "loss" if names[0].endswith("loss") else "score (%)"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


class DataTimer:
    """Adds up the time between steps, when a batch is awaited, and the time of the steps themselves."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._worked = 0.0
        self._since: float | None = None

    def batch_came(self) -> None:
        """Tell that a batch is there; before the first one the workers start, which is not counted."""
        now = time.perf_counter()
        if self._since is not None:
            self._waited += now - self._since
        self._since = now

    def batch_done(self) -> None:
        """Tell that a step is done and the next batch is wanted."""
        now = time.perf_counter()
        if self._since is not None:
            self._worked += now - self._since
        self._since = now

    def pause(self) -> None:
        """Leave out the time up to the next batch."""
        self._since = None

    def share(self) -> float:
        """Return the waiting as a share of the whole, 0 to 1; 0 before the second batch."""
        total = self._waited + self._worked
        return self._waited / total if total else 0.0


class GradientAccumulation(pl.Callback):
    """Accumulates gradients over as many batches as make up the batch size that a recipe was written for.

    The batches of an epoch are cut to whole steps, so that every step has the effective batch and an epoch
    has as many steps as on the recipe's devices.

    Args:
        size: images per step of the optimiser, over all devices.

    Raises:
        UsageError: below 1; when training begins: not a multiple of devices x batch size, fewer images than
            that, or an accumulation set by hand beside it.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UsageError(f"expected an effective batch of at least 1, got {size}")
        self.size = size

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Set the trainer's accumulation."""
        if trainer.accumulate_grad_batches != 1:
            raise UsageError(
                "expected either effective_batch or accumulate_grad_batches, got both "
                f"({self.size} and {trainer.accumulate_grad_batches})"
            )
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]  # unknown to its types
        at_once = loader.batch_size * trainer.world_size
        devices = "1 device" if trainer.world_size == 1 else f"{trainer.world_size} devices"
        if self.size % at_once:
            raise UsageError(
                f"expected an effective batch that is a multiple of {devices} x {loader.batch_size} images "
                f"= {at_once}, got {self.size}"
            )
        steps = self.size // at_once
        limit = trainer.limit_train_batches
        batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
        if batches < steps:
            raise UsageError(
                f"expected at least {self.size} images for one step of the effective batch, "
                f"got {batches * at_once}"
            )
        trainer.accumulate_grad_batches = steps
        trainer.limit_train_batches = batches // steps * steps
        _log.info(
            "effective batch %d = %s x %d images x %d accumulated batches; %d steps per epoch",
            self.size,
            devices,
            loader.batch_size,
            steps,
            batches // steps,
        )


class FinalValidation(pl.Callback):
    """Validates at the end of a run of so many steps and of one that validates every few epochs only.

    Lightning leaves the end of such a run without scores: nothing would be known of the exported weights.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Let the last epoch have a validation."""
        if trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Let the last step end the run as an early stop does: behind a validation."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True


class RunProgressBar(RichProgressBar):
    """Lightning's bar with epochs counted from 1 and numbers that a small learning rate survives."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        self.theme.metrics_format = ".3g"

    def _get_train_description(self, current_epoch: int) -> str:
        text = f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"
        # Uneven lengths of this text and of "Validation" make the bar flicker.
        return f"{text:{len(self.validation_description)}}"
