"""Callbacks of every run: metrics log, gradient accumulation and final validation."""

import csv
import io
import logging
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightspine.errors import LightspineError, UsageError
from lightspine.training.base import LightspineTask
from lightspine.training.progress import EpochTable
from lightspine.utils.devices import peak_memory_mib, synchronize
from lightspine.utils.files import atomic_write, atomic_write_text
from lightspine.utils.progress import print_line

_log = logging.getLogger(__name__)

_METRIC = re.compile(r"\w[\w./ -]{0,99}")
_AXIS_LABELS = {"val_top1": "accuracy (%)", "lr": "learning rate"}


class RunLog(pl.Callback):
    """Metrics logger: writes one row per epoch to `metrics.csv` and to every checkpoint.

    The rows are part of the checkpoint, so a resumed run continues the file. (Lightning's CSVLogger would
    delete the existing rows.)

    Args:
        folder: folder of `metrics.csv` and `curves.png`.
        announce: also print a table with a row per epoch to standard error.

    Attributes:
        rows: one dictionary per finished epoch: epoch, seconds, every metric that the task logs, `data_share`
            (fraction of the step time spent waiting for data), `peak_mib` (peak memory so far, of the GPU or
            else of the process) and `skipped_steps` so far.
    """

    def __init__(self, folder: Path, *, announce: bool = False) -> None:
        self.folder = folder
        self.announce = announce
        self.rows: list[dict[str, float]] = []
        self._table: EpochTable | None = None
        self._started = 0.0
        self._validated = False
        self._data_timer = DataTimer()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Broadcast the folder from rank 0."""
        self.folder = Path(trainer.strategy.broadcast(os.fspath(self.folder)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the timers of an epoch that is resumed midway."""
        self._start_epoch(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the timers."""
        self._start_epoch(pl_module)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Stop timing the wait for data."""
        self._data_timer.batch_ready()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Start timing the wait for the next batch."""
        self._data_timer.step_done()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Exclude the validation from the step times."""
        self._data_timer.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Record that the epoch was validated."""
        self._validated = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: LightspineTask) -> None:  # type: ignore[override]  # the only kind of module here
        """Write the row of the epoch."""
        # Not in on_validation_end, where the mean training loss is not known yet.
        row = {"epoch": float(trainer.current_epoch), "seconds": time.perf_counter() - self._started}
        # Lightning keeps the metrics of the last validation, which may be from an earlier epoch.
        row |= {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if self._validated or not name.startswith("val_")
        }
        # The mean of an epoch without a finite training loss is 0 / 0.
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        row["data_share"] = self._data_timer.wait_share()
        peak = peak_memory_mib(pl_module.device)
        if peak is not None:
            row["peak_mib"] = peak
        row["skipped_steps"] = float(pl_module.guard.skipped)
        self.rows.append(row)
        if trainer.is_global_zero:
            write_rows(self.folder / "metrics.csv", self.rows)
            if self.announce:
                names = [name for names in pl_module.curves for name in names]
                self._table = self._table or EpochTable(names)
                for line in self._table.lines(row, trainer.max_epochs):
                    print_line(line)

    def _start_epoch(self, module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        self._validated = False
        self._data_timer = DataTimer(module.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows from a checkpoint.

        Raises:
            LightspineError: they are no names and numbers.
        """
        rows = state_dict["rows"]
        if not all(
            isinstance(row, dict) and "epoch" in row and all(map(_is_metric, row, row.values()))
            for row in rows
        ):
            raise LightspineError("the metrics of the epochs in the checkpoint are damaged")
        self.rows = list(rows)


def _is_metric(name: Any, value: Any) -> bool:
    return isinstance(name, str) and _METRIC.fullmatch(name) is not None and isinstance(value, int | float)


class DataTimer:
    """Timer of the fraction of the step time that is spent waiting for data.

    On a CUDA device the times between the steps are those of the device, from events in its stream: while the
    host waits for a batch, the device may still be at work. Nothing waits for the device before `wait_share`.

    Args:
        device: device of the training; None is the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._waits: list[tuple[Any, Any]] = []
        self._steps: list[tuple[Any, Any]] = []
        self._since: Any = None

    def batch_ready(self) -> None:
        """Record that a batch has arrived. The wait for the first one, when workers start, does not count."""
        self._record(self._waits)

    def step_done(self) -> None:
        """Record that a step has ended and the next batch is requested."""
        self._record(self._steps)

    def pause(self) -> None:
        """Exclude the time until the next batch."""
        self._since = None

    def wait_share(self) -> float:
        """Return the fraction of the time spent waiting, from 0 to 1; 0 before the second batch."""
        if self._device is not None:
            synchronize(self._device)
        waited, worked = (
            sum(start.elapsed_time(end) if self._device is not None else end - start for start, end in spans)
            for spans in (self._waits, self._steps)
        )
        return waited / (waited + worked) if waited + worked else 0.0

    def _record(self, spans: list[tuple[Any, Any]]) -> None:
        now: Any = time.perf_counter()
        if self._device is not None:
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
        if self._since is not None:
            spans.append((self._since, now))
        self._since = now


class GradientAccumulation(pl.Callback):
    """Gradient accumulation up to an effective batch size over all devices.

    The number of batches per epoch is rounded down to complete optimizer steps, so that all have
    the same number of images.

    Args:
        effective_batch: images per optimizer step over all devices.

    Raises:
        UsageError: `effective_batch` is below 1. When training begins: it is not a multiple of devices x
            batch size, it exceeds the number of images, or `accumulate_grad_batches` is also set.
    """

    def __init__(self, effective_batch: int) -> None:
        if effective_batch < 1:
            raise UsageError(f"expected an effective batch of at least 1, got {effective_batch}")
        self.effective_batch = effective_batch

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Set `accumulate_grad_batches` and `limit_train_batches` of the trainer."""
        if trainer.accumulate_grad_batches != 1:
            raise UsageError(
                "expected either effective_batch or accumulate_grad_batches, got both "
                f"({self.effective_batch} and {trainer.accumulate_grad_batches})"
            )
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]  # unknown to its types
        images = loader.batch_size * trainer.world_size
        devices = "1 device" if trainer.world_size == 1 else f"{trainer.world_size} devices"
        if self.effective_batch % images:
            raise UsageError(
                f"expected an effective batch that is a multiple of {devices} x {loader.batch_size} images "
                f"= {images}, got {self.effective_batch}"
            )
        accumulated = self.effective_batch // images
        limit = trainer.limit_train_batches
        batches = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
        if batches < accumulated:
            raise UsageError(
                f"expected at least {self.effective_batch} images for one step with the effective batch, "
                f"got {batches * images}"
            )
        trainer.accumulate_grad_batches = accumulated
        trainer.limit_train_batches = batches // accumulated * accumulated
        _log.info(
            "effective batch %d = %s x %d images x %d accumulated batches; %d steps per epoch",
            self.effective_batch,
            devices,
            loader.batch_size,
            accumulated,
            batches // accumulated,
        )


class FinalValidation(pl.Callback):
    """Validates at the end of a run that is limited by `max_steps` or validates only every n epochs.

    Lightning would end such a run without validation, so the exported weights would have no score.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Enable validation in the last epoch."""
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
        """After the last step, request an early stop, before which Lightning validates."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True


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
    """Plot metrics over epochs to a PNG file.

    Args:
        path: the file.
        rows: rows of `RunLog`.
        title: title of the figure.
        curves: names of the metrics of each subplot.
    """
    # Not pyplot, which has global state and needs a display on some systems.
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
        axes.set_ylabel(_AXIS_LABELS.get(names[0], "loss" if names[0].endswith("loss") else "score (%)"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
