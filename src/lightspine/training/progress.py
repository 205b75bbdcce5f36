"""What a run shows while it goes on: a live bar in a terminal."""

import shutil
import sys

from lightning.pytorch.callbacks import RichProgressBar


class RunProgressBar(RichProgressBar):
    """Lightning's bar with epochs counted from 1 and numbers that a small learning rate survives."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        self.theme.metrics_format = ".3g"

    def _get_train_description(self, current_epoch: int) -> str:
        text = f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"
        # Uneven lengths of this text and of "Validation" make the bar flicker.
        return f"{text:{len(self.validation_description)}}"


def has_terminal() -> bool:
    """Return whether a live bar can be drawn."""
    return sys.stderr.isatty() and shutil.get_terminal_size().columns > 40
