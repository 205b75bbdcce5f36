"""Output of a run on standard error: a progress bar or lines, and a table with a row per epoch."""

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from lightspine.utils.progress import LINE_SECONDS, LineTimer, format_seconds, print_line

_WIDTH = 12


class EpochTable:
    """Table of the metrics of a run, printed row by row; metrics.csv has further columns.

    The last column is the fraction of the step time spent waiting for data.

    Args:
        metrics: names of the metrics to show, from the first epoch that has them. Names that end in "loss"
            are losses, "lr" is the learning rate, and all others are scores in percent.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = metrics
        self._known: set[str] = set()
        self._header = ""

    def lines(self, row: dict[str, float], epochs: int | None) -> list[str]:
        """Format the metrics of an epoch as a table row, with a header above it if there are new columns.

        A dash stands for a metric that this epoch does not have, as without validation.

        Args:
            row: row of `RunLog`.
            epochs: length of the run, or None if it is not known.
        """
        self._known |= row.keys()
        names = [name for name in self.metrics if name in self._known]
        total = "" if epochs is None or epochs < 0 else f"/{epochs}"
        width = 2 * len(total.lstrip("/")) + 1
        width = max(width, len("epoch"))
        header, line = "epoch".rjust(width), f"{int(row['epoch']) + 1}{total}".rjust(width)
        for name in names:
            title = name if _is_number(name) else f"{name} %"
            column = max(_WIDTH, len(title) + 2)
            header += title.rjust(column)
            line += (_format(name, row[name]) if name in row else "-").rjust(column)
        header += "time".rjust(9)
        line += format_seconds(row["seconds"]).rjust(9)
        if "data_share" in row:
            header += "data wait".rjust(_WIDTH)
            line += f"{100 * row['data_share']:.0f} %".rjust(_WIDTH)
        changed, self._header = header != self._header, header
        return [header, line] if changed else [line]


class LineProgress(pl.Callback):
    """Progress for log files: a line every few seconds, where a progress bar cannot be shown.

    Args:
        every_seconds: time between two lines.
    """

    def __init__(self, every_seconds: float = LINE_SECONDS) -> None:
        self._timer = LineTimer(every_seconds)
        self._started = 0.0
        self._first_batch = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Start the timers."""
        self._timer.restart()
        self._started = 0.0

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Start to measure the speed with the first batch, which may be in the middle of an epoch."""
        if not self._started:
            self._started, self._first_batch = time.perf_counter(), batch_idx

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Print the step, the loss of its batch, the speed and the remaining time of the epoch."""
        if not trainer.is_global_zero or not self._timer.is_due():
            return
        total = trainer.num_training_batches
        speed = (batch_idx + 1 - self._first_batch) / (time.perf_counter() - self._started)
        parts = [f"batch {batch_idx + 1}/{total}"]
        if isinstance(outputs, dict) and "loss" in outputs:
            # Lightning divides the loss of a batch by the number of accumulated batches.
            parts.append(f"loss {float(outputs['loss']) * trainer.accumulate_grad_batches:.4g}")
        parts.append(f"{speed:.3g} batches/s")
        if math.isfinite(total):
            parts.append(f"{format_seconds((total - batch_idx - 1) / speed)} left in the epoch")
        self._print(trainer, ", ".join(parts))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print how many batches of the validation are done."""
        if trainer.is_global_zero and self._timer.is_due():
            total = trainer.num_val_batches[dataloader_idx]
            self._print(trainer, f"validation, batch {batch_idx + 1}/{total}")

    def _print(self, trainer: pl.Trainer, text: str) -> None:
        epochs = trainer.max_epochs
        total = "" if epochs is None or epochs < 0 else f"/{epochs}"
        print_line(f"epoch {trainer.current_epoch + 1}{total}: {text}")


class RunProgressBar(RichProgressBar):
    """Lightning's progress bar with epochs counted from 1 and three significant digits."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        self.theme.metrics_format = ".3g"

    def _get_train_description(self, current_epoch: int) -> str:
        text = f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"
        # Padded to the length of "Validation", or the bar flickers.
        return f"{text:{len(self.validation_description)}}"


def _is_number(name: str) -> bool:
    return name == "lr" or name.endswith("loss")


def _format(name: str, value: float) -> str:
    if name == "lr":
        return f"{value:.2e}"
    if name.endswith("loss"):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"
    return f"{value:.2f}"
