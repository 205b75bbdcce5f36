"""Exponents of costs over the pixel count."""

import math

import pytest

from lightspine.benchmark.report.fit import fit_power
from lightspine.errors import UsageError


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_exact_power_law_gives_its_exponent_without_error(exponent: float) -> None:
    pixels = [32**2, 64**2, 128**2, 200 * 300]
    fit = fit_power(pixels, [3.0 * count**exponent for count in pixels])
    assert fit.exponent == pytest.approx(exponent)
    assert fit.standard_error == pytest.approx(0, abs=1e-6)
    assert fit.factor == pytest.approx(3.0)


def test_fitted_cost_lies_on_the_law() -> None:
    fit = fit_power([1, 10, 100], [2, 20, 200])
    assert fit.at(1000) == pytest.approx(2000)


def test_standard_error_is_that_of_the_textbook() -> None:
    # In logarithms to base e: x = 0, 1, 2 and y = 0, 1 + d, 2. The slope stays 1, the residuals are
    # -d/3, 2d/3, -d/3, their squares sum to 2 d^2 / 3, and x has the sum of squares 2.
    d = 0.3
    fit = fit_power([math.exp(x) for x in (0, 1, 2)], [math.exp(y) for y in (0, 1 + d, 2)])
    assert fit.exponent == pytest.approx(1)
    assert fit.standard_error == pytest.approx(math.sqrt((2 * d**2 / 3) / (3 - 2) / 2))


def test_fit_is_written_with_its_error() -> None:
    assert str(fit_power([1, 2, 4], [1, 2, 4])) == "1.00 ± 0.00"


@pytest.mark.parametrize(
    ("pixels", "costs"),
    [([1, 2], [1, 2]), ([1, 2, 2], [1, 2, 2]), ([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 0, 2])],
    ids=["two sizes", "two different sizes", "a cost missing", "a cost of zero"],
)
def test_what_has_no_exponent_is_refused(pixels: list[float], costs: list[float]) -> None:
    with pytest.raises(UsageError, match="costs above zero at 3 or more sizes"):
        fit_power(pixels, costs)
