"""How a cost grows with the size of the image: a power law fitted to measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress

from lightspine.errors import UsageError

FEWEST_SIZES = 3
"""With two sizes any power law fits, and its error cannot be told."""


@dataclass(frozen=True, kw_only=True)
class PowerFit:
    """`cost = factor * pixels ** exponent`.

    Attributes:
        exponent: 1 where the cost grows as the pixel count does, 2 where it grows as its square.
        standard_error: of the exponent.
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
    """Fit a power law by least squares between the logarithms.

    Args:
        pixels: height times width of each measurement; at least three different ones.
        costs: time or memory, above zero, as many.

    Raises:
        UsageError: fewer than three sizes, different lengths or a cost that has no logarithm.
    """
    if len(set(pixels)) < FEWEST_SIZES or len(pixels) != len(costs) or min(*pixels, *costs) <= 0:
        raise UsageError(
            f"a power law needs costs above zero at {FEWEST_SIZES} or more sizes, "
            f"got {list(costs)} at {list(pixels)} px"
        )
    line = linregress(np.log(pixels), np.log(costs))
    return PowerFit(
        exponent=float(line.slope),
        standard_error=float(line.stderr),
        factor=float(np.exp(line.intercept)),
    )
