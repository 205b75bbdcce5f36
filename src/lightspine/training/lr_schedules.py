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


@dataclass(frozen=True, kw_only=True)
class MilestoneSchedule:
    """A constant rate that is cut at milestones, as detectors are trained.

    With W warm-up steps and w the warm-up ratio the rate of step t < W is the regular one times
    1 - (1 - t / W) (1 - w).

    Attributes:
        milestones: when the rate is multiplied by `gamma`, in `unit`.
        length: of the run, in `unit`.
        unit: "epoch" or "step" of the optimiser.
        gamma: factor at each milestone.
        warmup_steps: W, steps of the optimiser.
        warmup_ratio: w, the first rate as a share of the regular one.
    """

    milestones: tuple[float, ...]
    length: float
    unit: Literal["epoch", "step"] = "epoch"
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_ratio: float = 0.001

    @property
    def total_epochs(self) -> float | None:
        """Epochs of the whole run, where the schedule counts them."""
        return self.length if self.unit == "epoch" else None

    @property
    def total_steps(self) -> float | None:
        """Steps of the whole run, where the schedule counts them."""
        return self.length if self.unit == "step" else None

    def check(self) -> None:
        """Refuse a value out of its range.

        Raises:
            UsageError: milestones that do not ascend within the run, or a wrong factor, ratio or warm-up.
        """
        points = [0, *self.milestones, self.length]
        if self.length <= 0 or points != sorted(set(points)):
            raise UsageError(
                f"expected milestones that ascend between 0 and the length {self.length:g}, got "
                f"{list(self.milestones)}"
            )
        if self.gamma <= 0:
            raise UsageError(f"expected a gamma above 0, got {self.gamma}")
        _check_warmup(self.warmup_steps, self.warmup_ratio)

    def rate(self, step: int, *, lr: float, steps_per_epoch: int, total_batch: int) -> float:  # noqa: ARG002
        """Return the learning rate of a step; see `CosineSchedule.rate`."""
        # mmdet and detectron2 cut by whole epochs or steps.
        time = step // steps_per_epoch if self.unit == "epoch" else step
        passed = sum(time >= milestone for milestone in self.milestones)
        return lr * self.gamma**passed * _warmup(step, self.warmup_steps, self.warmup_ratio)


@dataclass(frozen=True, kw_only=True)
class DecaySchedule:
    """A rate that falls over a given number of steps, as segmenters are trained.

    With T steps, W of them warm-up, r the highest and m the smallest rate:

        s = t / T, or with `after_warmup` (t - W) / (T - W), and 0 before
        m + (r - m) (1 - s)^power, or m + (r - m) (1 + cos(pi s)) / 2

    times 1 - (1 - t / W) (1 - w) in the warm-up.

    Attributes:
        steps: T, of the optimiser.
        shape: "poly" or "cosine".
        power: of the polynomial.
        min_lr: m.
        warmup_steps: W.
        warmup_ratio: w, the first rate as a share of the regular one.
        after_warmup: the decay begins where the warm-up ends (mmengine); else it runs since the first step
            and the warm-up hides its beginning (mmcv 1).
    """

    steps: int
    shape: Literal["poly", "cosine"] = "poly"
    power: float = 1.0
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float = 0.001
    after_warmup: bool = False

    @property
    def total_epochs(self) -> None:
        """Epochs of the whole run, which depend on the data."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps

    def check(self) -> None:
        """Refuse a value out of its range.

        Raises:
            UsageError: no steps, a warm-up that fills them, a power or a rate below 0.
        """
        if not 0 <= self.warmup_steps < self.steps:
            raise UsageError(
                f"expected a warm-up from 0 to less than the {self.steps} steps, got {self.warmup_steps}"
            )
        for name in ("power", "min_lr"):
            if getattr(self, name) < 0:
                raise UsageError(f"expected a {name} of at least 0, got {getattr(self, name)}")
        _check_warmup(self.warmup_steps, self.warmup_ratio)

    def rate(self, step: int, *, lr: float, steps_per_epoch: int, total_batch: int) -> float:  # noqa: ARG002
        """Return the learning rate of a step; see `CosineSchedule.rate`."""
        begin = self.warmup_steps if self.after_warmup else 0
        share = min(max((step - begin) / (self.steps - begin), 0.0), 1.0)
        left = (1 + math.cos(math.pi * share)) / 2 if self.shape == "cosine" else (1 - share) ** self.power
        regular = self.min_lr + (lr - self.min_lr) * left
        return regular * _warmup(step, self.warmup_steps, self.warmup_ratio)


def _warmup(step: int, steps: int, ratio: float) -> float:
    return 1.0 if step >= steps else 1 - (1 - step / steps) * (1 - ratio)


def _check_warmup(steps: int, ratio: float) -> None:
    if steps < 0 or not 0 <= ratio <= 1:
        raise UsageError(
            f"expected warmup_steps of at least 0 and a warmup_ratio from 0 to 1, got {steps} and {ratio}"
        )
