"""Learning-rate schedules of the official training scripts, as functions of the optimizer step.

A schedule is a dataclass that a recipe sets under `schedule:`. The fields select the class: `epochs` for
`CosineSchedule` (classification), `milestones` for `MilestoneSchedule` (detection), `steps` for
`DecaySchedule` (segmentation).
"""

import math
from dataclasses import dataclass
from typing import Literal

from lightspine.errors import UsageError

Unit = Literal["step", "epoch"]


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear warm-up, cosine decay and constant cool-down.

    With t in epochs, warm-up length W, cosine length T and peak rate r:

        t < W              warmup_lr + (r - warmup_lr) t / W
        t < T              min_lr + (r - min_lr) (1 + cos(pi s)) / 2,  s = (t - W) / (T - W) or t / T
        otherwise          min_lr

    Attributes:
        epochs: T, length of the cosine including the warm-up, without the cool-down.
        warmup_epochs: W.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the cosine.
        cooldown_epochs: epochs at `min_lr` after the cosine; the run has T + cooldown_epochs epochs.
        unit: "step" updates the rate at every optimizer step, "epoch" once per epoch.
        after_warmup: start the cosine when the warm-up ends, s = (t - W) / (T - W). Otherwise it starts with
            the first epoch, s = t / T, and the warm-up replaces its beginning.
        lag_epochs: number of epochs to subtract from t, down to 0. Use 1 for scripts that pass the finished
            epoch to the scheduler: their first two epochs have the same rate.
        lag_steps: number of optimizer steps to subtract from t, down to 0, if `unit` is "step". Use 1 for
            scripts that pass the finished step to the scheduler: their first two steps have the same rate.
        batch: reference batch size of `lr`: the rate scales linearly with the total batch size of the run.
            None disables the scaling.
        scale_ends: scale `warmup_lr` and `min_lr` with the batch size too.
    """

    epochs: float
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    unit: Unit = "step"
    after_warmup: bool = False
    lag_epochs: int = 0
    lag_steps: int = 0
    batch: int | None = None
    scale_ends: bool = False

    @property
    def total_epochs(self) -> float:
        """Length of the run in epochs, with the cool-down."""
        return self.epochs + self.cooldown_epochs

    @property
    def total_steps(self) -> float | None:
        """Always None, because the number of steps depends on the data."""
        return None

    def check(self) -> None:
        """Check that all values are in range.

        The constructor does not check, because the recipe parser would hide the message in a type error.

        Raises:
            UsageError: a value is out of range.
        """
        if self.epochs <= 0:
            raise UsageError(f"expected a schedule of more than 0 epochs, got {self.epochs}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UsageError(
                f"expected a warm-up from 0 to less than {self.epochs:g} epochs, got {self.warmup_epochs:g}"
            )
        for name in ("warmup_lr", "min_lr", "cooldown_epochs", "lag_epochs", "lag_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"expected {name} of at least 0, got {getattr(self, name)}")
        if self.lag_steps and self.unit != "step":
            raise UsageError(f"expected unit 'step' in a schedule with lag_steps, got {self.unit!r}")
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"expected the batch size of a schedule to be at least 1, got {self.batch}")
        if self.scale_ends and self.batch is None:
            raise UsageError("expected `batch` in a schedule with scale_ends, got None")

    def rate(self, step: int, *, lr: float, steps_per_epoch: int, total_batch: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: optimizer step, from 0.
            lr: peak learning rate as in the recipe, before batch-size scaling.
            steps_per_epoch: optimizer steps per epoch.
            total_batch: images per optimizer step over all devices.
        """
        scale = 1.0 if self.batch is None else total_batch / self.batch
        highest, ends = lr * scale, scale if self.scale_ends else 1.0
        first, lowest = self.warmup_lr * ends, self.min_lr * ends
        step = max(step - self.lag_steps, 0)
        t = step / steps_per_epoch if self.unit == "step" else float(step // steps_per_epoch)
        t = max(t - self.lag_epochs, 0.0)
        if t < self.warmup_epochs:
            return first + (highest - first) * t / self.warmup_epochs
        if t >= self.epochs:
            return lowest
        begin = self.warmup_epochs if self.after_warmup else 0.0
        share = (t - begin) / (self.epochs - begin)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, kw_only=True)
class MilestoneSchedule:
    """Step decay at milestones with linear warm-up, as for training detectors.

    In warm-up step t < W the rate is multiplied by 1 - (1 - t / W) (1 - w), with warm-up ratio w.

    Attributes:
        milestones: times at which the rate is multiplied by `gamma`, in `unit`.
        length: length of the run, in `unit`.
        unit: "epoch", or "step" for optimizer steps.
        gamma: factor at each milestone.
        warmup_steps: W, in optimizer steps.
        warmup_ratio: w, the first rate as a fraction of the regular rate.
    """

    milestones: tuple[float, ...]
    length: float
    unit: Literal["epoch", "step"] = "epoch"
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_ratio: float = 0.001

    @property
    def total_epochs(self) -> float | None:
        """Length of the run in epochs, or None if it is given in steps."""
        return self.length if self.unit == "epoch" else None

    @property
    def total_steps(self) -> float | None:
        """Length of the run in optimizer steps, or None if it is given in epochs."""
        return self.length if self.unit == "step" else None

    def check(self) -> None:
        """Check that all values are in range.

        Raises:
            UsageError: milestones are not increasing or outside the run, or another value is out of range.
        """
        points = [0, *self.milestones, self.length]
        if self.length <= 0 or points != sorted(set(points)):
            raise UsageError(
                f"expected increasing milestones between 0 and the length {self.length:g}, got "
                f"{list(self.milestones)}"
            )
        if self.gamma <= 0:
            raise UsageError(f"expected a gamma above 0, got {self.gamma}")
        _check_warmup(self.warmup_steps, self.warmup_ratio)

    def rate(self, step: int, *, lr: float, steps_per_epoch: int, total_batch: int) -> float:  # noqa: ARG002
        """Return the learning rate of a step; see `CosineSchedule.rate`."""
        # mmdet and detectron2 decay at whole epochs or steps.
        time = step // steps_per_epoch if self.unit == "epoch" else step
        passed = sum(time >= milestone for milestone in self.milestones)
        return lr * self.gamma**passed * _warmup_factor(step, self.warmup_steps, self.warmup_ratio)


@dataclass(frozen=True, kw_only=True)
class DecaySchedule:
    """Polynomial or cosine decay per step with linear warm-up, as for training segmenters.

    With T steps, W warm-up steps, warm-up ratio w, peak rate r and minimum rate m:

        s = t / T, or with `after_warmup` max(t - W, 0) / (T - W)
        m + (r - m) (1 - s)^power, or m + (r - m) (1 + cos(pi s)) / 2

    multiplied by 1 - (1 - t / W) (1 - w) during warm-up.

    Attributes:
        steps: T, in optimizer steps.
        shape: "poly" or "cosine".
        power: exponent of the polynomial.
        min_lr: m.
        warmup_steps: W.
        warmup_ratio: w, the first rate as a fraction of the regular rate.
        after_warmup: start the decay when the warm-up ends, as in mmengine. Otherwise it starts with the
            first step, as in mmcv 1.
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
        """Always None, because the number of epochs depends on the data."""
        return None

    @property
    def total_steps(self) -> int:
        """Length of the run in optimizer steps."""
        return self.steps

    def check(self) -> None:
        """Check that all values are in range.

        Raises:
            UsageError: a value is out of range.
        """
        if not 0 <= self.warmup_steps < self.steps:
            raise UsageError(
                f"expected a warm-up from 0 to less than the {self.steps} steps, got {self.warmup_steps}"
            )
        for name in ("power", "min_lr"):
            if getattr(self, name) < 0:
                raise UsageError(f"expected {name} of at least 0, got {getattr(self, name)}")
        _check_warmup(self.warmup_steps, self.warmup_ratio)

    def rate(self, step: int, *, lr: float, steps_per_epoch: int, total_batch: int) -> float:  # noqa: ARG002
        """Return the learning rate of a step; see `CosineSchedule.rate`."""
        begin = self.warmup_steps if self.after_warmup else 0
        share = min(max((step - begin) / (self.steps - begin), 0.0), 1.0)
        left = (1 + math.cos(math.pi * share)) / 2 if self.shape == "cosine" else (1 - share) ** self.power
        regular = self.min_lr + (lr - self.min_lr) * left
        return regular * _warmup_factor(step, self.warmup_steps, self.warmup_ratio)


def warmup_cosine(step: int, warmup: int, total: int, floor: float) -> float:
    """Return the learning-rate factor of linear warm-up and cosine decay from 1 to `floor`.

    Args:
        step: optimizer step, from 0.
        warmup: steps of the warm-up.
        total: steps of the run.
        floor: factor at the end of the run.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _warmup_factor(step: int, steps: int, ratio: float) -> float:
    return 1.0 if step >= steps else 1 - (1 - step / steps) * (1 - ratio)


def _check_warmup(steps: int, ratio: float) -> None:
    if steps < 0 or not 0 <= ratio <= 1:
        raise UsageError(
            f"expected warmup_steps of at least 0 and a warmup_ratio from 0 to 1, got {steps} and {ratio}"
        )
