"""Models measured at several sizes: their costs by pixel count, and the exponents fitted to them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightspine.benchmark.report.conditions import (
    Conditions,
    conditions_of,
    grouped,
    name_of,
    pixels_of,
    size_of,
)
from lightspine.benchmark.report.fit import FEWEST_SIZES, PowerFit, fit_power
from lightspine.benchmark.results import Row


class Quantity(NamedTuple):
    """Something that costs: its name, its unit and where a row has it."""

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
    """One quantity of one model over the sizes.

    Attributes:
        quantity: what it cost.
        rows: those that have the quantity, by rising pixel count.
        costs: of these rows.
        fit: the power law, where there are at least three sizes.
    """

    quantity: Quantity
    rows: tuple[Row, ...]
    costs: tuple[float, ...]
    fit: PowerFit | None

    @property
    def pixels(self) -> list[int]:
        """Pixel counts of the rows."""
        return [pixels_of(row) for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One model in one mode over the sizes.

    Attributes:
        name: of the model, short, with its mode.
        rows: all of them, also those that failed.
        conditions: under which it was measured.
    """

    name: str
    rows: tuple[Row, ...]
    conditions: Conditions

    def curve(self, quantity: Quantity) -> Curve | None:
        """Return a quantity over the sizes, or `None` where no row has it."""
        pairs = [(row, cost) for row in self.rows if (cost := quantity.of(row))]
        if not pairs:
            return None
        pairs.sort(key=lambda pair: pixels_of(pair[0]))
        rows, costs = zip(*pairs, strict=True)
        pixels = [pixels_of(row) for row in rows]
        fit = fit_power(pixels, costs) if len(set(pixels)) >= FEWEST_SIZES else None
        return Curve(quantity=quantity, rows=rows, costs=costs, fit=fit)

    @property
    def out_of_memory(self) -> list[Row]:
        """The rows whose memory did not suffice."""
        return [row for row in self.rows if row.status == "out_of_memory"]


def find_series(rows: Iterable[Row]) -> list[Series]:
    """Return each model and mode that was tried at three or more sizes, in the order of the rows."""
    present = [row for row in rows if row.status != "absent"]
    groups = grouped(present, lambda row: (row.source, row.model, row.variant, row.mode, conditions_of(row)))
    return [
        Series(name=f"{name_of(of_model[0])}, {of_model[0].mode}", rows=tuple(of_model), conditions=key[-1])
        for key, of_model in groups.items()
        if len({pixels_of(row) for row in of_model}) >= FEWEST_SIZES
        and any(row.status == "ok" for row in of_model)
    ]


class Exponent(NamedTuple):
    """A line of the table of exponents."""

    series: str
    conditions: str
    quantity: str
    sizes: str
    fit: PowerFit


def exponents(series: Sequence[Series]) -> list[Exponent]:
    """Return every exponent that can be fitted, quantity by quantity."""
    return [
        Exponent(
            series=one.name,
            conditions=str(one.conditions),
            quantity=quantity.name,
            sizes=f"{size_of(curve.rows[0])} to {size_of(curve.rows[-1])}, {len(set(curve.pixels))} sizes",
            fit=curve.fit,
        )
        for quantity in (*INFERENCE, *TRAINING)
        for one in series
        if (curve := one.curve(quantity)) is not None and curve.fit is not None
    ]
