"""Schedules of the dense tasks, counted in steps: milestones, and polynomial or cosine decay."""

import math
from dataclasses import dataclass
from typing import Literal

from lightspine.errors import UsageError


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
