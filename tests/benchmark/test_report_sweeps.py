"""Resolution sweeps in a benchmark report, with fitted power laws."""

import math
from dataclasses import replace

import pytest

from lightspine.benchmark.report.conditions import TIMES
from lightspine.benchmark.report.sweeps import find_exponents, find_sweeps, fit_power
from lightspine.benchmark.results import Row
from lightspine.errors import UsageError
from support.bench_results import a_row, a_timing, sizes_result


def _rows(exponent: float, sides: tuple[int, ...] = (224, 448, 672)) -> list[Row]:
    return [
        a_row(
            "vim_tiny",
            height=side,
            width=side,
            forward=a_timing(1e-3 * (side * side) ** exponent),
            peak_memory_mib=float(side),
        )
        for side in sides
    ]


def test_exponents_are_over_the_pixel_count() -> None:
    found = {line.quantity: line.fit.exponent for line in find_exponents(find_sweeps(_rows(1.25)))}
    # Memory grows with the side, which is the root of the pixels.
    assert found == pytest.approx({"forward pass": 1.25, "memory, forward": 0.5})


def test_two_sizes_make_no_sweep() -> None:
    assert find_sweeps(_rows(1.0, sides=(224, 448))) == []


def test_size_without_memory_belongs_to_the_sweep_but_not_to_the_fit() -> None:
    (_, peer) = find_sweeps(sizes_result().rows)
    assert [row.height for row in peer.out_of_memory] == [1344]
    assert {line.sizes for line in find_exponents([peer])} == {f"224{TIMES}224 to 1120{TIMES}1120, 5 sizes"}


def test_sweep_with_two_measured_sizes_has_no_exponent() -> None:
    rows = _rows(1.0)
    rows[-1] = replace(rows[-1], status="out_of_memory", forward=None, peak_memory_mib=None)
    assert find_exponents(find_sweeps(rows)) == []


def test_modes_and_batches_are_sweeps_of_their_own() -> None:
    rows = _rows(1.0)
    others = [replace(row, mode="onnx") for row in rows] + [replace(row, batch=8) for row in rows]
    assert len(find_sweeps(rows + others)) == 3


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
