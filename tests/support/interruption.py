"""Callbacks that kill or hang a rank at a given step."""

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl


class KillAtStep(pl.Callback):
    """Sends a signal to the process after an optimizer step.

    Args:
        step: counted from 1.
        number: the signal; 9 cannot be handled, 2 is what a terminal sends at Ctrl-C.
        rank: the rank to kill.
    """

    def __init__(self, step: int, number: int = 9, rank: int = 0) -> None:
        self.step = step
        self.number = number
        self.rank = rank

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.Signals(self.number))


class HangAtStep(pl.Callback):
    """Hangs one rank, like a collective that waits for a dead one."""

    def __init__(self, step: int, rank: int) -> None:
        self.step = step
        self.rank = rank

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            time.sleep(3600)
