"""Resolution sweeps: cost of a model over the number of pixels, and the fitted power laws."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import linregress

from lightspine.benchmark.report.conditions import (
    Conditions,
    conditions_of,
    count_pixels,
    format_size,
    group_by,
    short_name,
)
from lightspine.benchmark.results import Row
from lightspine.errors import UsageError

MIN_SIZES = 3
"""Two sizes always fit a power law exactly, without an error estimate."""


@dataclass(frozen=True, kw_only=True)
class PowerFit:
    """Fitted power law, `cost = factor * pixels ** exponent`.

    Attributes:
        exponent: 1 for a cost that is linear in the pixels, 2 for a quadratic one.
        standard_error: standard error of the exponent.
        factor: cost of one pixel.
    """

    exponent: float
    standard_error: float
    factor: float

    def at(self, pixels: float) -> float:
        """Return the fitted cost at a number of pixels."""
        return float(self.factor * pixels**self.exponent)

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.standard_error:.2f}"


def fit_power(pixels: Sequence[float], costs: Sequence[float]) -> PowerFit:
    """Fit a power law by least squares on the logarithms.

    Args:
        pixels: number of pixels of each measurement; at least three different ones.
        costs: cost of each measurement, above zero.

    Raises:
        UsageError: fewer than three sizes, or a cost that is not positive.
    """
    if len(set(pixels)) < MIN_SIZES or len(pixels) != len(costs) or min(*pixels, *costs) <= 0:
        raise UsageError(
            f"expected costs above zero at {MIN_SIZES} or more sizes, "
            f"got {list(costs)} at {list(pixels)} pixels"
        )
    line = linregress(np.log(pixels), np.log(costs))
    return PowerFit(
        exponent=float(line.slope),
        standard_error=float(line.stderr),
        factor=float(np.exp(line.intercept)),
    )


class Quantity(NamedTuple):
    """A cost: name, unit and its value in a row."""

    name: str
    unit: str
    of: Callable[[Row], float | None]


INFERENCE = (
    Quantity("forward pass", "ms", lambda row: row.forward.median_ms if row.forward else None),
    Quantity("memory, forward", "MiB", lambda row: row.peak_memory_mib),
)
TRAINING = (
    Quantity("training step", "ms", lambda row: row.train_step.median_ms if row.train_step else None),
    Quantity("memory, training", "MiB", lambda row: row.train_memory_mib),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity of one model over the image size.

    Attributes:
        rows: the rows that have the quantity, sorted by pixels.
        pixels: pixels of these rows.
        costs: costs of these rows.
        fit: the power law; `None` with fewer than three sizes.
    """

    rows: tuple[Row, ...]
    pixels: tuple[int, ...]
    costs: tuple[float, ...]
    fit: PowerFit | None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One model in one mode at three or more image sizes.

    Attributes:
        name: short name and mode.
        rows: all rows, including those that failed.
        conditions: conditions of all rows.
    """

    name: str
    rows: tuple[Row, ...]
    conditions: Conditions

    def curve(self, quantity: Quantity) -> Curve | None:
        """Return a quantity over the image size, or `None` if no row has it."""
        measured = sorted(
            ((row, cost) for row in self.rows if (cost := quantity.of(row))),
            key=lambda pair: count_pixels(pair[0]),
        )
        if not measured:
            return None
        rows, costs = zip(*measured, strict=True)
        pixels = tuple(count_pixels(row) for row in rows)
        fit = fit_power(pixels, costs) if len(set(pixels)) >= MIN_SIZES else None
        return Curve(rows=rows, pixels=pixels, costs=costs, fit=fit)

    @property
    def out_of_memory(self) -> list[Row]:
        """The rows that ran out of memory."""
        return [row for row in self.rows if row.status == "out_of_memory"]


def find_sweeps(rows: Iterable[Row]) -> list[Sweep]:
    """Return each model and mode that was run at three or more image sizes, in the order of the rows."""
    present = [row for row in rows if row.status != "absent"]
    groups = group_by(present, lambda row: (row.source, row.model, row.variant, row.mode, conditions_of(row)))
    return [
        Sweep(name=f"{short_name(group[0])}, {group[0].mode}", rows=tuple(group), conditions=key[-1])
        for key, group in groups.items()
        if len({count_pixels(row) for row in group}) >= MIN_SIZES and any(row.status == "ok" for row in group)
    ]


class Exponent(NamedTuple):
    """A row of the table of exponents."""

    sweep: str
    conditions: str
    quantity: str
    sizes: str
    fit: PowerFit


def find_exponents(sweeps: Sequence[Sweep]) -> list[Exponent]:
    """Return all fitted exponents, ordered by quantity."""
    return [
        Exponent(
            sweep=sweep.name,
            conditions=str(sweep.conditions),
            quantity=quantity.name,
            sizes=f"{format_size(curve.rows[0])} to {format_size(curve.rows[-1])}, "
            f"{len(set(curve.pixels))} sizes",
            fit=curve.fit,
        )
        for quantity in (*INFERENCE, *TRAINING)
        for sweep in sweeps
        if (curve := sweep.curve(quantity)) is not None and curve.fit is not None
    ]
