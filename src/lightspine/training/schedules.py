"""The learning rate as a function of time: the rules that the official training scripts follow."""

import math
from dataclasses import dataclass
from typing import Literal

from lightspine.errors import UsageError

Unit = Literal["step", "epoch"]


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """A linear warm-up, a cosine down to a smallest rate, and a cool-down at that rate.

    With t in epochs, W the warm-up, T the epochs of the cosine and r the highest rate:

        t < W              warmup_lr + (r - warmup_lr) t / W
        t < T              min_lr + (r - min_lr) (1 + cos(pi s)) / 2,  s = (t - W) / (T - W) or t / T
        later              min_lr

    Attributes:
        epochs: T, the epochs without the cool-down.
        warmup_epochs: W.
        warmup_lr: rate at the start of the warm-up.
        min_lr: rate at the end of the cosine.
        cooldown_epochs: epochs at `min_lr` behind the cosine, so that the run has T + cooldown_epochs.
        unit: "step": t grows with every step of the optimiser; "epoch": it is a whole number of epochs.
        after_warmup: the cosine begins where the warm-up ends, s = (t - W) / (T - W); else it has run since
            the first epoch, s = t / T, and the warm-up hides its beginning.
        lag_epochs: t counts so many epochs too few, but never below 0. A scheduler that is told the number of
            the epoch just finished lags by one: the first two epochs have the same rate.
        batch: the total batch size for which the rate is given: it grows and shrinks with the batch size of
            the run. None: it does not depend on it.
        scale_ends: `warmup_lr` and `min_lr` are given for that batch size too.
    """

    epochs: float
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    unit: Unit = "step"
    after_warmup: bool = False
    lag_epochs: int = 0
    batch: int | None = None
    scale_ends: bool = False

    @property
    def total_epochs(self) -> float:
        """Epochs of the whole run, with the cool-down."""
        return self.epochs + self.cooldown_epochs

    @property
    def total_steps(self) -> float | None:
        """Steps of the whole run, which depend on the data."""
        return None

    def check(self) -> None:
        """Refuse a value out of its range.

        Not done at construction: the parser of recipes would take the error for a wrong type and bury it.

        Raises:
            UsageError: a value is out of its range.
        """
        if self.epochs <= 0:
            raise UsageError(f"expected a schedule of more than 0 epochs, got {self.epochs}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UsageError(
                f"expected a warm-up from 0 to less than {self.epochs:g} epochs, got {self.warmup_epochs:g}"
            )
        for name in ("warmup_lr", "min_lr", "cooldown_epochs", "lag_epochs"):
            if getattr(self, name) < 0:
                raise UsageError(f"expected a {name} of at least 0, got {getattr(self, name)}")
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"expected the batch size of a schedule to be at least 1, got {self.batch}")
        if self.scale_ends and self.batch is None:
            raise UsageError("expected the batch size for which the rates are given, since scale_ends is on")

    def rate(self, step: int, *, lr: float, steps_per_epoch: int, total_batch: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: number of the step of the optimiser, from 0.
            lr: the highest rate, as the recipe gives it.
            steps_per_epoch: steps of the optimiser in an epoch.
            total_batch: images per step over all devices.
        """
        scale = 1.0 if self.batch is None else total_batch / self.batch
        highest, ends = lr * scale, scale if self.scale_ends else 1.0
        first, lowest = self.warmup_lr * ends, self.min_lr * ends
        t = step / steps_per_epoch if self.unit == "step" else float(step // steps_per_epoch)
        t = max(t - self.lag_epochs, 0.0)
        if t < self.warmup_epochs:
            return first + (highest - first) * t / self.warmup_epochs
        if t >= self.epochs:
            return lowest
        begin = self.warmup_epochs if self.after_warmup else 0.0
        share = (t - begin) / (self.epochs - begin)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * share)) / 2


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Return the factor of the rate: linear up over `warmup` steps, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
